"""The operators, defined once: schema and fake here, kernels in the rooms. ``torch.compile`` and export see
these.

They name their kernel and scheme by string, so that a traced graph is plain data and finds its kernel again
in another process.

``quantport::linear`` is differentiable in the activations and the bias: ``dX = dY W`` with the dequantized
weight, and the quantization of activations is passed straight through (as if it rounded nothing; Bengio et
al., arXiv:1308.3432). Weights get no gradient: codes have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor

from quantport import numerics
from quantport.errors import RoutingError, ShapeError, UnsupportedError
from quantport.kernels.base import Kernel, Packed, Request, WeightSpec
from quantport.kernels.embedding import look_up
from quantport.kernels.verdict import Claim, Reason
from quantport.modules.routing import Weight, run_experts, tables
from quantport.plugins.registry import default_registry

_LIB = torch.library.Library("quantport", "DEF")
_LIB.define("linear(Tensor x, Tensor[] packed, Tensor? bias, str kernel, str scheme, int n, int k) -> Tensor")
_LIB.define("linear_backward(Tensor grad, Tensor[] packed, str kernel, str scheme, int n, int k) -> Tensor")
_LIB.define(
    "embedding(Tensor ids, Tensor[] packed, str kernel, str scheme, int n, int k, ScalarType dtype) -> Tensor"
)
_LIB.define(
    "grouped_linear(Tensor x, Tensor offsets, Tensor[] packed, Tensor? bias, str kernel, str "
    "scheme, int n, int k, "
    "int shared=1) -> Tensor"
)
_LIB.define(
    "experts(Tensor x, Tensor index, Tensor weights, Tensor[] packed, int[] sizes, str[] kernels, "
    "str[] schemes, "
    "int experts, int hidden, int intermediate, str activation) -> Tensor"
)


def run_linear(kernel: Kernel, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
    """Runs a kernel on activations of any rank: ``[..., k]`` to ``[..., n]``; differentiable where a gradient
    is asked for.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = torch.ops.quantport.linear(x, packed, bias, kernel.name, spec.scheme.name, spec.n, spec.k)
        return y
    return _run(kernel, x, packed, bias, spec)


class Differentiable(Kernel):
    """A kernel whose ``run`` is ``run_linear``, for code that calls kernels itself and whose activations want
    a gradient.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.name = kernel, kernel.name

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        """Those of the kernel."""
        return self.kernel.reasons_against(request)

    def claim(self, request: Request) -> Claim:
        """That of the kernel."""
        return self.kernel.claim(request)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        """The kernel forward, the dequantized weight backward; x as the layer gets it, not rotated yet."""
        return run_linear(self.kernel, x, packed, bias, spec)

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        """The same: ``run_linear`` rotates."""
        return self.run(x, packed, bias, spec)

    def apply_grouped(
        self,
        x: Tensor,
        offsets: Tensor,
        packed: Sequence[Packed],
        bias: Tensor | None,
        spec: WeightSpec,
        shared: int = 1,
    ) -> Tensor:
        """The same, group by group."""
        return self.run_grouped(x, offsets, packed, bias, spec, shared)


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
def _linear(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, kernel: str, scheme: str, n: int, k: int
) -> Tensor:
    return _run(
        default_registry().kernel(kernel),
        x,
        tuple(packed),
        bias,
        WeightSpec(default_registry().schemes[scheme], n, k),
    )


@torch.library.register_fake("quantport::linear", lib=_LIB)  # type: ignore[untyped-decorator]  # torch has no types here
def _linear_fake(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, kernel: str, scheme: str, n: int, k: int
) -> Tensor:
    _check_width(x, k)
    return x.new_empty((*x.shape[:-1], n))


@torch.library.impl(_LIB, "linear_backward", "CompositeExplicitAutograd")
def _linear_backward(grad: Tensor, packed: list[Tensor], kernel: str, scheme: str, n: int, k: int) -> Tensor:
    spec = WeightSpec(default_registry().schemes[scheme], n, k)
    return grad @ numerics.dequantize_weight(
        default_registry().kernel(kernel).unpack(tuple(packed), spec), spec.scheme, k, grad.dtype
    )


@torch.library.register_fake("quantport::linear_backward", lib=_LIB)  # type: ignore[untyped-decorator]  # torch has no types here
def _linear_backward_fake(
    grad: Tensor, packed: list[Tensor], kernel: str, scheme: str, n: int, k: int
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], k))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, bias, *ctx.names = inputs
    ctx.save_for_backward(*packed)
    ctx.bias = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    wants_x, wants_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    packed = list(ctx.saved_tensors)  # once: checkpointing forgets them as it gives them
    x = torch.ops.quantport.linear_backward(grad, packed, *ctx.names) if wants_x else None
    bias = grad.flatten(0, -2).float().sum(0).to(ctx.bias) if wants_bias else None
    return x, [None] * len(packed), bias, None, None, None, None


torch.library.register_autograd("quantport::linear", _backward, setup_context=_keep, lib=_LIB)


@torch.library.impl(_LIB, "embedding", "CompositeExplicitAutograd")
def _embedding(
    ids: Tensor, packed: list[Tensor], kernel: str, scheme: str, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    return look_up(
        default_registry().kernel(kernel),
        ids,
        tuple(packed),
        WeightSpec(default_registry().schemes[scheme], n, k),
        dtype,
    )


@torch.library.register_fake("quantport::embedding", lib=_LIB)  # type: ignore[untyped-decorator]  # torch has no types here
def _embedding_fake(
    ids: Tensor, packed: list[Tensor], kernel: str, scheme: str, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    return ids.new_empty((*ids.shape, k), dtype=dtype)


def run_grouped(
    kernel: Kernel,
    x: Tensor,
    offsets: Tensor,
    packed: Sequence[Packed],
    bias: Tensor | None,
    spec: WeightSpec,
    shared: int = 1,
) -> Tensor:
    """Checks the groups, and multiplies the rows of each by its weights: see ``Kernel.run_grouped``. Rows of
    no group give zeros.

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
    y = kernel.apply_grouped(
        routed, offsets.to(torch.int32), kernel.bundle(packed, shared), bias, spec, shared
    )
    past = x.shape[0] - bounds[-1]
    return torch.nn.functional.pad(y, (0, 0, 0, past)) if past else y


@torch.library.impl(_LIB, "grouped_linear", "CompositeExplicitAutograd")
def _grouped(
    x: Tensor,
    offsets: Tensor,
    packed: list[Tensor],
    bias: Tensor | None,
    kernel: str,
    scheme: str,
    n: int,
    k: int,
    shared: int = 1,
) -> Tensor:
    weights = max(1, (offsets.numel() - 1) * shared)
    each = max(1, len(packed) // weights)
    spec = WeightSpec(default_registry().schemes[scheme], n, k)
    return run_grouped(
        default_registry().kernel(kernel),
        x,
        offsets,
        _by(packed, [each] * (len(packed) // each)),
        bias,
        spec,
        shared,
    )


@torch.library.register_fake("quantport::grouped_linear", lib=_LIB)  # type: ignore[untyped-decorator]  # torch has no types here
def _grouped_fake(
    x: Tensor,
    offsets: Tensor,
    packed: list[Tensor],
    bias: Tensor | None,
    kernel: str,
    scheme: str,
    n: int,
    k: int,
    shared: int = 1,
) -> Tensor:
    return x.new_empty((x.shape[0], shared * n))


def _by(packed: Sequence[Tensor], sizes: Sequence[int]) -> list[Packed]:
    """Takes a flat list apart again: so many tensors for each weight."""
    it = iter(packed)
    return [tuple(islice(it, size)) for size in sizes]


@torch.library.impl(_LIB, "experts", "CompositeExplicitAutograd")
def _experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    packed: list[Tensor],
    sizes: list[int],
    kernels: list[str],
    schemes: list[str],
    experts: int,
    hidden: int,
    intermediate: int,
    activation: str,
) -> Tensor:
    count = 3 * experts
    sizes, kernels, schemes = ([*v] * (count // len(v)) for v in (sizes, kernels, schemes))
    shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)] * experts
    bound = {name: default_registry().kernel(name) for name in dict.fromkeys(kernels)}
    known = {name: default_registry().schemes[name] for name in dict.fromkeys(schemes)}
    layer = tables(
        [
            Weight(bound[kernel], WeightSpec(known[scheme], n, k), own)
            for kernel, scheme, (n, k), own in zip(kernels, schemes, shapes, _by(packed, sizes), strict=True)
        ]
    )
    return run_experts(x, index, weights, layer, activation)


@torch.library.register_fake("quantport::experts", lib=_LIB)  # type: ignore[untyped-decorator]  # torch has no types here
def _experts_fake(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    packed: list[Tensor],
    sizes: list[int],
    kernels: list[str],
    schemes: list[str],
    experts: int,
    hidden: int,
    intermediate: int,
    activation: str,
) -> Tensor:
    return torch.empty_like(x)


def _no_backward(ctx: Any, grad: Tensor) -> None:
    suggestion = "run the experts without torch.compile, where the gradient goes through each projection"
    raise UnsupportedError(
        "a gradient through compiled quantized experts", "quantport::experts has none", suggestion
    )


torch.library.register_autograd("quantport::experts", _no_backward, lib=_LIB)
