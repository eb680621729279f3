"""The operators, defined once: schema and fake here, kernels in the rooms. ``torch.compile`` and export see
these.

They name kernel, scheme and shape by a handle, so that a traced graph is plain data and finds its kernel
again in another process: see ``quantport.modules.handles``.

``quantport::linear`` is differentiable in the activations and the bias: ``dX = dY W`` with the dequantized
weight, and the quantization of activations is passed straight through (as if it rounded nothing; Bengio et
al., arXiv:1308.3432). Weights get no gradient: codes have none. ``quantport::experts`` has
none either: outside of graphs it is that of each projection. Where nobody wants a gradient graphs call
``quantport::linear_no_grad`` and ``quantport::experts_no_grad``: the autograd of an operator in Python costs
more than all else of its dispatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from quantport import numerics
from quantport.errors import RoutingError, ShapeError, UnsupportedError
from quantport.kernels.base import Kernel, Packed, WeightSpec
from quantport.kernels.embedding import look_up
from quantport.kernels.grouped import GroupedKernel, loop_over_groups, rotated
from quantport.modules import expert_layout, handles
from quantport.modules.handles import BoundWeight
from quantport.modules.routing import run_experts

_LIB = torch.library.Library("quantport", "DEF")
# Where the host waits for the device, nothing can be captured. Builds before 2.9 have no tag for it.
_HOST_WAITS = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))
_LIB.define("linear(Tensor x, Tensor[] packed, Tensor? bias, str handle) -> Tensor")
_LIB.define("linear_no_grad(Tensor x, Tensor[] packed, Tensor? bias, str handle) -> Tensor")
_LIB.define("linear_backward(Tensor grad, Tensor[] packed, str handle) -> Tensor")
_LIB.define("embedding(Tensor ids, Tensor[] packed, str handle, ScalarType dtype) -> Tensor")
_LIB.define(
    "grouped_linear(Tensor x, Tensor offsets, Tensor[] packed, Tensor? bias, str handle, int shared=1) "
    "-> Tensor",
    tags=_HOST_WAITS,
)
_EXPERTS = "(Tensor x, Tensor index, Tensor weights, Tensor[] packed, int[] sizes, str handle) -> Tensor"
for _suffix in ("", "_no_grad"):
    _LIB.define(f"experts{_suffix}{_EXPERTS}")
    _LIB.define(f"experts_loop{_suffix}{_EXPERTS}", tags=_HOST_WAITS)


def linear(bound: BoundWeight, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """``run_linear``, or its operator in a graph that is being compiled; under autocast on what
    ``torch.nn.functional.linear`` would be cast to, whatever the kernel.
    """
    if is_autocast(x):
        x, bias = autocast(x), None if bias is None else autocast(bias)
        with torch.autocast(x.device.type, enabled=False):  # kernels choose their dtypes themselves
            return linear(bound, x, packed, bias)
    if not torch.compiler.is_compiling() or wants_gradient(x, bias):
        return run_linear(bound, x, packed, bias)
    if torch.compiler.is_exporting():  # no guard asks again, when it runs, whether a gradient is wanted
        z: Tensor = torch.ops.quantport.linear(x, packed, bias, bound.handle)
        return z
    y: Tensor = torch.ops.quantport.linear_no_grad(x, packed, bias, bound.handle)
    return y


def is_plain_call(x: Tensor) -> bool:
    """Whether a call is nothing but that: no graph is made, no gradient wanted, and no autocast on."""
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return False
    return not (x.requires_grad and torch.is_grad_enabled())


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor; there is none for tensors without data."""
    # one call decides where it is off: a question by device costs a text each time
    return torch._C._is_any_autocast_enabled() and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def autocast(x: Tensor) -> Tensor:
    """Casts as autocast does: every float but fp64."""
    if not x.is_floating_point() or x.dtype is torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def run_linear(bound: BoundWeight, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """Runs a kernel on activations of any rank: ``[..., k]`` to ``[..., n]``; differentiable where a gradient
    is asked for.
    """
    if wants_gradient(x, bias):
        y: Tensor = torch.ops.quantport.linear(x, packed, bias, bound.handle)
        return y
    return _run(bound.kernel, x, packed, bias, bound.spec)


def wants_gradient(x: Tensor, other: Tensor | None) -> bool:
    """Whether a gradient is asked for, of activations or of what else may have one."""
    return torch.is_grad_enabled() and (x.requires_grad or (other is not None and other.requires_grad))


def _check_width(x: Tensor, k: int) -> None:
    """Refuses activations of another width: a kernel trusts it, and would read past the end of a row."""
    if x.dim() == 0 or x.shape[-1] != k:
        raise ShapeError(
            f"multiply activations {list(x.shape)}",
            f"a quantized weight of {k} inputs",
            f"activations [..., {k}]",
        )


def _run(kernel: Kernel, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
    _check_width(x, spec.k)
    if x.dim() == 2:
        return kernel.apply(x.contiguous(), packed, bias, spec)
    return kernel.apply(x.reshape(-1, spec.k).contiguous(), packed, bias, spec).view(*x.shape[:-1], spec.n)


@torch.library.impl(_LIB, "linear", "CompositeExplicitAutograd")
@torch.library.impl(_LIB, "linear_no_grad", "CompositeExplicitAutograd")
def _linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, handle: str) -> Tensor:
    bound = handles.resolve(handle)
    return _run(bound.kernel, x, tuple(packed), bias, bound.spec)


@torch.library.register_fake("quantport::linear", lib=_LIB)  # type: ignore[untyped-decorator]  # torch has no types here
@torch.library.register_fake("quantport::linear_no_grad", lib=_LIB)  # type: ignore[untyped-decorator]  # as above
def _linear_fake(x: Tensor, packed: list[Tensor], bias: Tensor | None, handle: str) -> Tensor:
    spec = handles.resolve(handle).spec
    _check_width(x, spec.k)
    return x.new_empty((*x.shape[:-1], spec.n))


@torch.library.impl(_LIB, "linear_backward", "CompositeExplicitAutograd")
def _linear_backward(grad: Tensor, packed: list[Tensor], handle: str) -> Tensor:
    kernel, spec = (bound := handles.resolve(handle)).kernel, bound.spec
    stored_weight = kernel.unpack(tuple(packed), spec)
    return grad @ numerics.dequantize_weight(stored_weight, spec.scheme, spec.k, grad.dtype)


@torch.library.register_fake("quantport::linear_backward", lib=_LIB)  # type: ignore[untyped-decorator]  # torch has no types here
def _linear_backward_fake(grad: Tensor, packed: list[Tensor], handle: str) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], handles.resolve(handle).spec.k))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, bias, ctx.handle = inputs
    ctx.save_for_backward(*packed)
    ctx.bias = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    wants_x, wants_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    packed = list(ctx.saved_tensors)  # once: checkpointing forgets them as it gives them
    x = torch.ops.quantport.linear_backward(grad, packed, ctx.handle) if wants_x else None
    bias = grad.flatten(0, -2).float().sum(0).to(ctx.bias) if wants_bias else None
    return x, [None] * len(packed), bias, None


torch.library.register_autograd("quantport::linear", _backward, setup_context=_keep, lib=_LIB)


@torch.library.impl(_LIB, "embedding", "CompositeExplicitAutograd")
def _embedding(ids: Tensor, packed: list[Tensor], handle: str, dtype: torch.dtype) -> Tensor:
    bound = handles.resolve(handle)
    return look_up(bound.kernel, ids, tuple(packed), bound.spec, dtype)


@torch.library.register_fake("quantport::embedding", lib=_LIB)  # type: ignore[untyped-decorator]  # torch has no types here
def _embedding_fake(ids: Tensor, packed: list[Tensor], handle: str, dtype: torch.dtype) -> Tensor:
    return ids.new_empty((*ids.shape, handles.resolve(handle).spec.k), dtype=dtype)


def run_grouped(
    kernel: Kernel,
    x: Tensor,
    offsets: Tensor,
    packed: Sequence[Packed],
    bias: Tensor | None,
    spec: WeightSpec,
    shared: int = 1,
) -> Tensor:
    """Checks the groups, and multiplies the rows of each by its weights, in one launch where the kernel has
    one. Rows of no group give zeros. The host waits for the device.

    Args:
        kernel: Any kernel.
        x: Activations ``[T, K]``, sorted by group.
        offsets: Integer ``[G + 1]``: where each group starts, and the last one ends.
        packed: ``shared`` packed weights for each group, group by group.
        bias: ``[G, shared * N]`` or None.
        spec: Scheme and shape of every weight.
        shared: Weights of a group that read the same rows.

    Returns:
        ``[T, shared * N]``.

    Raises:
        RoutingError: offsets that do not rise from 0 to at most the number of rows, or weights for other
            groups.
    """
    groups = offsets.numel() - 1
    bounds = offsets.tolist() if offsets.dim() == 1 else []
    rows = x.shape[0] if x.dim() == 2 and x.shape[1] == spec.k else -1
    if not bounds or bounds[0] != 0 or bounds[-1] > rows or any(b < a for a, b in pairwise(bounds)):
        found = f"offsets {bounds[:4]}...{bounds[-2:]} for activations {list(x.shape)}"
        raise RoutingError(
            "multiply rows by groups", found, f"offsets [groups + 1] that rise from 0, and rows of {spec.k}"
        )
    if len(packed) != groups * shared:
        raise RoutingError(
            f"multiply {groups} groups by {shared} weights each",
            f"{len(packed)} weights",
            f"{groups * shared}",
        )
    routed = x[: bounds[-1]].contiguous()
    if isinstance(kernel, GroupedKernel):
        stack = kernel.prepare_grouped(packed, shared)
        y = kernel.apply_grouped(routed, offsets.to(torch.int32), stack, bias, spec, shared)
    else:
        y = loop_over_groups(
            lambda rows, weight, part: kernel.run(rows, weight, part, spec),
            rotated(routed, spec),
            bounds,
            lambda g, j: packed[shared * g + j],
            bias,
            spec.n,
            shared,
        )
    past = x.shape[0] - bounds[-1]
    return torch.nn.functional.pad(y, (0, 0, 0, past)) if past else y


@torch.library.impl(_LIB, "grouped_linear", "CompositeExplicitAutograd")
def _grouped(
    x: Tensor, offsets: Tensor, packed: list[Tensor], bias: Tensor | None, handle: str, shared: int = 1
) -> Tensor:
    bound = handles.resolve(handle)
    each = max(1, len(packed) // max(1, (offsets.numel() - 1) * shared))
    weights = [tuple(packed[i : i + each]) for i in range(0, len(packed), each)]
    return run_grouped(bound.kernel, x, offsets, weights, bias, bound.spec, shared)


@torch.library.register_fake("quantport::grouped_linear", lib=_LIB)  # type: ignore[untyped-decorator]  # torch has no types here
def _grouped_fake(
    x: Tensor, offsets: Tensor, packed: list[Tensor], bias: Tensor | None, handle: str, shared: int = 1
) -> Tensor:
    return x.new_empty((x.shape[0], shared * handles.resolve(handle).spec.n))


def _experts(
    x: Tensor, index: Tensor, weights: Tensor, packed: list[Tensor], sizes: list[int], handle: str
) -> Tensor:
    layout = expert_layout.resolve_experts(handle)
    biases = packed[len(packed) - len(layout.form.biases) :]
    return run_experts(x, index, weights, layout, layout.weights(packed, sizes), biases)


def _experts_fake(
    x: Tensor, index: Tensor, weights: Tensor, packed: list[Tensor], sizes: list[int], handle: str
) -> Tensor:
    return x.new_empty(x.shape)  # contiguous, however ``x`` lies


def _no_backward(ctx: Any, grad: Tensor) -> None:
    suggestion = "run the experts without torch.compile, where the gradient goes through each projection"
    raise UnsupportedError(
        "a gradient through compiled quantized experts", "quantport::experts has none", suggestion
    )


for _name in ("experts", "experts_loop"):
    for _each in (_name, f"{_name}_no_grad"):
        torch.library.impl(_LIB, _each, "CompositeExplicitAutograd")(_experts)
        torch.library.register_fake(f"quantport::{_each}", _experts_fake, lib=_LIB)
    torch.library.register_autograd(f"quantport::{_name}", _no_backward, lib=_LIB)
