"""Checkpoints each of whose modules has codes and scales under names of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from quantport.checkpoint import Coded, CodedTensor, TensorSource
from quantport.model.patterns import bounded
from quantport_formats.compressed_tensors_config import Args, Group
from quantport_formats.input_scales import InputScale
from quantport_formats.module_weights import Weights
from quantport_formats.not_used import cache_of, of_activations, unused

_CODES = (torch.int8, torch.uint8, torch.float8_e4m3fn)
_BESIDE_CODES = (
    ".weight_scale",
    ".weight_scale_2",
    ".weight_zero_point",
    ".weight_g_idx",
    ".weight_shape",
    ".weight_global_scale",
)


def coded_modules(source: TensorSource) -> Iterator[str]:
    """The modules whose weights are stored as codes."""
    for name, info in source.tensors.items():
        if name.endswith(".weight_packed"):
            yield name.removesuffix(".weight_packed")
        elif name.endswith(".weight") and info.dtype in _CODES:
            yield name.removesuffix(".weight")


def of_modules(
    weights: Weights, modules: Iterable[str], group_of: Callable[[str], Group], cache: Args | None
) -> Coded:
    """The checkpoint whose modules are quantized as groups say.

    Args:
        weights: Reads them.
        modules: Those that are stored as codes.
        group_of: The group of a module.
        cache: The KV cache that is asked for.

    Raises:
        CheckpointError: a tensor is absent, or is part of nothing.
    """
    coded: dict[str, CodedTensor] = {}
    notices: dict[str, None] = {}
    with bounded():
        for module in modules:
            group = group_of(module)
            weight = _with_inputs(weights, module, group)
            coded[f"{module}.weight"] = weight
            assert weight.scheme is not None  # `Weights.read` holds each in a scheme
            notices |= dict.fromkeys(of_activations(group, weight.scheme))
    used = {name for weight in coded.values() for name in weight.tensors}
    for name in weights.source.tensors:
        if name not in used and (name in coded or name.endswith(_BESIDE_CODES)):
            raise weights.wrong(
                f"{name}, which belongs to no weight that is stored as codes",
                "the complete checkpoint, with quantization_config as it was saved",
            )
    kept, more = cache_of(cache)
    spare, texts = unused(weights.source, used)
    said = [*notices, *weights.notices, *more, *texts]
    return Coded(weights.format_name, weights.source, coded, unlisted=spare, kv_cache=kept, notices=said)


def _with_inputs(weights: Weights, module: str, group: Group) -> CodedTensor:
    """The weight of a module, with the scale of activations that is stored for it."""
    weight, inputs = weights.read(module, group), group.inputs
    assert weight.scheme is not None  # as above
    active = weight.scheme.activation
    plain = active is not None and active.plain
    if inputs is None or not (inputs.static and inputs.strategy == "tensor" and plain):
        return weight
    names = f"{module}.input_scale", f"{module}.input_zero_point"
    scale = InputScale(weights.source, weights.format_name, *names, asymmetric=not inputs.symmetric)
    return scale.beside(weight, weights.schemes)
