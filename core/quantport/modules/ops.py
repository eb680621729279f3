"""The operators, defined once: schema and fake here, kernels in the rooms. ``torch.compile`` and export see these.

``quantport::linear`` and ``quantport::experts`` name their kernel and scheme by string, so that a traced graph is
plain data and finds its kernel again in another process.

``quantport::linear`` is differentiable in the activations and the bias: ``dX = dY W`` with the dequantized weight, and the
quantization of activations is passed straight through (as if it rounded nothing; Bengio et al., arXiv:1308.3432). Weights get no
gradient: codes have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantport import numerics
from quantport.capability import Claim
from quantport.errors import UnsupportedError
from quantport.host import host
from quantport.kernel import Kernel, Packed, Request, WeightSpec
from quantport.lookup import look_up
from quantport.modules.routing import run_experts

_LIB = torch.library.Library("quantport", "DEF")
_LIB.define("linear(Tensor x, Tensor[] packed, Tensor? bias, str kernel, str scheme, int n, int k) -> Tensor")
_LIB.define("linear_backward(Tensor grad, Tensor[] packed, str kernel, str scheme, int n, int k) -> Tensor")
_LIB.define("embedding(Tensor ids, Tensor[] packed, str kernel, str scheme, int n, int k, ScalarType dtype) -> Tensor")
_LIB.define(
    "experts(Tensor x, Tensor index, Tensor weights, Tensor[] packed, str kernel, str scheme, int experts, int hidden, "
    "int intermediate, str activation) -> Tensor"
)


def run_linear(kernel: Kernel, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
    """Runs a kernel on activations of any rank: ``[..., k]`` to ``[..., n]``; differentiable where a gradient is asked for."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = torch.ops.quantport.linear(x, packed, bias, kernel.name, spec.scheme.name, spec.n, spec.k)
        return y
    return _run(kernel, x, packed, bias, spec)


class Differentiable(Kernel):
    """A kernel whose ``run`` is ``run_linear``, for code that calls kernels itself and whose activations want a gradient."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.name = kernel, kernel.name

    def reasons_against(self, request: Request) -> Sequence[str]:
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


def _run(kernel: Kernel, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
    if x.dim() == 2:
        return kernel.apply(x.contiguous(), packed, bias, spec)
    return kernel.apply(x.reshape(-1, spec.k).contiguous(), packed, bias, spec).view(*x.shape[:-1], spec.n)


@torch.library.impl(_LIB, "linear", "CompositeExplicitAutograd")
def _linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, kernel: str, scheme: str, n: int, k: int) -> Tensor:
    return _run(host().kernel(kernel), x, tuple(packed), bias, WeightSpec(host().schemes[scheme], n, k))


@torch.library.register_fake("quantport::linear", lib=_LIB)  # type: ignore[untyped-decorator]  # torch has no types here
def _linear_fake(x: Tensor, packed: list[Tensor], bias: Tensor | None, kernel: str, scheme: str, n: int, k: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.impl(_LIB, "linear_backward", "CompositeExplicitAutograd")
def _linear_backward(grad: Tensor, packed: list[Tensor], kernel: str, scheme: str, n: int, k: int) -> Tensor:
    spec = WeightSpec(host().schemes[scheme], n, k)
    return grad @ numerics.dequantize_weight(host().kernel(kernel).unpack(tuple(packed), spec), spec.scheme, k, grad.dtype)


@torch.library.register_fake("quantport::linear_backward", lib=_LIB)  # type: ignore[untyped-decorator]  # torch has no types here
def _linear_backward_fake(grad: Tensor, packed: list[Tensor], kernel: str, scheme: str, n: int, k: int) -> Tensor:
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
def _embedding(ids: Tensor, packed: list[Tensor], kernel: str, scheme: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return look_up(host().kernel(kernel), ids, tuple(packed), WeightSpec(host().schemes[scheme], n, k), dtype)


@torch.library.register_fake("quantport::embedding", lib=_LIB)  # type: ignore[untyped-decorator]  # torch has no types here
def _embedding_fake(ids: Tensor, packed: list[Tensor], kernel: str, scheme: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty((*ids.shape, k), dtype=dtype)


@torch.library.impl(_LIB, "experts", "CompositeExplicitAutograd")
def _experts(
    x: Tensor, index: Tensor, weights: Tensor, packed: list[Tensor], kernel: str, scheme: str,
    experts: int, hidden: int, intermediate: int, activation: str,
) -> Tensor:  # fmt: skip
    up = WeightSpec(host().schemes[scheme], intermediate, hidden)
    down = WeightSpec(up.scheme, hidden, intermediate)
    each = len(packed) // (3 * experts)
    tables = [tuple(packed[i : i + each]) for i in range(0, len(packed), each)]
    return run_experts(host().kernel(kernel), x, index, weights, tables, (up, down), activation)


@torch.library.register_fake("quantport::experts", lib=_LIB)  # type: ignore[untyped-decorator]  # torch has no types here
def _experts_fake(
    x: Tensor, index: Tensor, weights: Tensor, packed: list[Tensor], kernel: str, scheme: str,
    experts: int, hidden: int, intermediate: int, activation: str,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x)


def _no_backward(ctx: Any, grad: Tensor) -> None:
    works = "run the experts without torch.compile, where the gradient goes through each projection"
    raise UnsupportedError("a gradient through compiled quantized experts", "quantport::experts has none", works)


torch.library.register_autograd("quantport::experts", _no_backward, lib=_LIB)
