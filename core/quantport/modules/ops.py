"""The operators, defined once: schema and fake here, kernels in the rooms. ``torch.compile`` and export see these.

``quantport::linear`` and ``quantport::experts`` name their kernel and scheme by string, so that a traced graph is
plain data and finds its kernel again in another process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantport.host import host
from quantport.kernel import Kernel, Packed, WeightSpec
from quantport.modules.routing import run_experts

_LIB = torch.library.Library("quantport", "DEF")
_LIB.define("linear(Tensor x, Tensor[] packed, Tensor? bias, str kernel, str scheme, int n, int k) -> Tensor")
_LIB.define(
    "experts(Tensor x, Tensor index, Tensor weights, Tensor[] packed, str kernel, str scheme, int experts, int hidden, "
    "int intermediate, str activation) -> Tensor"
)


def run_linear(kernel: Kernel, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
    """Runs a kernel on activations of any rank: ``[..., k]`` to ``[..., n]``."""
    if x.dim() == 2:
        return kernel.apply(x.contiguous(), packed, bias, spec)
    return kernel.apply(x.reshape(-1, spec.k).contiguous(), packed, bias, spec).view(*x.shape[:-1], spec.n)


@torch.library.impl(_LIB, "linear", "CompositeExplicitAutograd")
def _linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, kernel: str, scheme: str, n: int, k: int) -> Tensor:
    spec = WeightSpec(host().schemes[scheme], n, k)
    return run_linear(host().kernel(kernel), x, tuple(packed), bias, spec)


@torch.library.register_fake("quantport::linear", lib=_LIB)  # type: ignore[untyped-decorator]  # torch has no types here
def _linear_fake(x: Tensor, packed: list[Tensor], bias: Tensor | None, kernel: str, scheme: str, n: int, k: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


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
