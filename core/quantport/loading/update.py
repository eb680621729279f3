"""``update_weight``: a new 16-bit weight for a module that is quantized already."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor

from quantport.errors import WeightError, one_of
from quantport.loading.weight_tasks import quantize_on
from quantport.modules import QuantModule
from quantport.numerics.by_rows import join_steps


def update_weight(module: QuantModule, name: str, weight: Tensor, *, nonfinite: str = "error") -> None:
    """Quantizes a new weight with the module's own scheme, and takes it in place. A stored scale of
    activations stays.

    The module has the bits of a fresh load afterwards. What is packed alike keeps its memory, so that graphs
    which were captured over it stay valid. If anything is wrong, the module is unchanged.

    Args:
        module: A quantized module.
        name: Name of the weight: ``""`` of a linear layer, ``"3.down_proj"`` of an expert, ``"q_proj"`` of a
            layer that is quantized in parts.
        weight: ``[n, k]``, bf16, fp16 or fp32, on any device.
        nonfinite: ``error`` refuses NaN and Inf; ``zero`` reads each of them as 0.

    Raises:
        WeightError: the module is not quantized, has no such weight, or one of another shape; or the
            weight cannot be quantized.
    """
    if not isinstance(module, QuantModule):
        found = f"a {type(module).__name__}"
        raise WeightError(
            f"update weight {name!r}", found, "a layer that quantport quantized, such as a QuantLinear"
        )
    asked = f"update weight {name!r} of a {type(module).__name__}"
    spec = module.specs.get(name)
    if spec is None:
        raise WeightError(asked, "no weight of this name", one_of(name, [repr(n) for n in module.specs]))
    if tuple(weight.shape) != (spec.n, spec.k):
        raise WeightError(asked, f"shape {list(weight.shape)}", f"shape {[spec.n, spec.k]}")
    device, scheme = module.registry.device(module.device), spec.scheme.per_token
    steps = quantize_on(
        lambda start, stop: nullcontext(weight[start:stop]),
        weight.dtype,
        replace(spec, scheme=scheme),
        name or "weight",
        nonfinite,
        module.registry.backends[device.kind].quantize_weight,
        module.device,
        device.arch.storage_only_dtypes,
    )
    stored = join_steps(steps, scheme, (spec.n, spec.k))
    if spec.scheme.static:  # a scale of activations stays as it is
        own = module.stored_weight(name)
        stored |= {key: own[key] for key in own.keys() - stored.keys()}
    module.set_weight(name, stored, in_place=True)
