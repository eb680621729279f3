"""The operators, defined once: schema and fake here, kernels in the rooms. ``torch.compile`` and export see these.

They name their kernel and scheme by string, so that a traced graph is plain data and finds its kernel again in another
process.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, pairwise

import torch
from torch import Tensor

from quantport.errors import RoutingError
from quantport.host import host
from quantport.kernel import Kernel, Packed, WeightSpec
from quantport.modules.routing import Weight, run_experts, tables

_LIB = torch.library.Library("quantport", "DEF")
_LIB.define("linear(Tensor x, Tensor[] packed, Tensor? bias, str kernel, str scheme, int n, int k) -> Tensor")
_LIB.define(
    "grouped_linear(Tensor x, Tensor offsets, Tensor[] packed, Tensor? bias, str kernel, str scheme, int n, int k, "
    "int shared=1) -> Tensor"
)
_LIB.define(
    "experts(Tensor x, Tensor index, Tensor weights, Tensor[] packed, int[] sizes, str[] kernels, str[] schemes, "
    "int experts, int hidden, int intermediate, str activation) -> Tensor"
)


def run_linear(kernel: Kernel, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
    """Runs a kernel on activations of any rank: ``[..., k]`` to ``[..., n]``."""
    if x.dim() == 2:
        return kernel.run(x.contiguous(), packed, bias, spec)
    return kernel.run(x.reshape(-1, spec.k).contiguous(), packed, bias, spec).view(*x.shape[:-1], spec.n)


@torch.library.impl(_LIB, "linear", "CompositeExplicitAutograd")
def _linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, kernel: str, scheme: str, n: int, k: int) -> Tensor:
    spec = WeightSpec(host().schemes[scheme], n, k)
    return run_linear(host().kernel(kernel), x, tuple(packed), bias, spec)


@torch.library.register_fake("quantport::linear", lib=_LIB)  # type: ignore[untyped-decorator]  # torch has no types here
def _linear_fake(x: Tensor, packed: list[Tensor], bias: Tensor | None, kernel: str, scheme: str, n: int, k: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def run_grouped(
    kernel: Kernel, x: Tensor, offsets: Tensor, packed: Sequence[Packed], bias: Tensor | None, spec: WeightSpec, shared: int = 1
) -> Tensor:
    """Checks the groups, and multiplies the rows of each by its weights: see ``Kernel.run_grouped``.

    Raises:
        RoutingError: offsets that do not rise from 0 to at most the number of rows, or weights for other groups.
    """
    groups = offsets.numel() - 1
    bounds = offsets.tolist() if offsets.dim() == 1 else []
    rows = x.shape[0] if x.dim() == 2 and x.shape[1] == spec.k else -1
    if not bounds or bounds[0] != 0 or bounds[-1] > rows or any(b < a for a, b in pairwise(bounds)):
        found = f"offsets {bounds[:4]}...{bounds[-2:]} for activations {list(x.shape)}"
        raise RoutingError("multiply rows by groups", found, f"offsets [groups + 1] that rise from 0, and rows of {spec.k}")
    if len(packed) != groups * shared:
        raise RoutingError(f"multiply {groups} groups by {shared} weights each", f"{len(packed)} weights", f"{groups * shared}")
    return kernel.run_grouped(x.contiguous(), offsets.to(torch.int32), packed, bias, spec, shared)


@torch.library.impl(_LIB, "grouped_linear", "CompositeExplicitAutograd")
def _grouped(
    x: Tensor, offsets: Tensor, packed: list[Tensor], bias: Tensor | None, kernel: str, scheme: str, n: int, k: int, shared: int = 1
) -> Tensor:
    weights = max(1, (offsets.numel() - 1) * shared)
    each = max(1, len(packed) // weights)
    spec = WeightSpec(host().schemes[scheme], n, k)
    return run_grouped(host().kernel(kernel), x, offsets, _by(packed, [each] * (len(packed) // each)), bias, spec, shared)


@torch.library.register_fake("quantport::grouped_linear", lib=_LIB)  # type: ignore[untyped-decorator]  # torch has no types here
def _grouped_fake(
    x: Tensor, offsets: Tensor, packed: list[Tensor], bias: Tensor | None, kernel: str, scheme: str, n: int, k: int, shared: int = 1
) -> Tensor:
    return x.new_empty((x.shape[0], shared * n))


def _by(packed: Sequence[Tensor], sizes: Sequence[int]) -> list[Packed]:
    """Takes a flat list apart again: so many tensors for each weight."""
    it = iter(packed)
    return [tuple(islice(it, size)) for size in sizes]


@torch.library.impl(_LIB, "experts", "CompositeExplicitAutograd")
def _experts(
    x: Tensor, index: Tensor, weights: Tensor, packed: list[Tensor], sizes: list[int], kernels: list[str], schemes: list[str],
    experts: int, hidden: int, intermediate: int, activation: str,
) -> Tensor:  # fmt: skip
    count = 3 * experts
    sizes, kernels, schemes = ([*v] * (count // len(v)) for v in (sizes, kernels, schemes))
    shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)] * experts
    bound = {name: host().kernel(name) for name in dict.fromkeys(kernels)}
    known = {name: host().schemes[name] for name in dict.fromkeys(schemes)}
    layer = tables([
        Weight(bound[kernel], WeightSpec(known[scheme], n, k), own)
        for kernel, scheme, (n, k), own in zip(kernels, schemes, shapes, _by(packed, sizes), strict=True)
    ])  # fmt: skip
    return run_experts(x, index, weights, layer, activation)


@torch.library.register_fake("quantport::experts", lib=_LIB)  # type: ignore[untyped-decorator]  # torch has no types here
def _experts_fake(
    x: Tensor, index: Tensor, weights: Tensor, packed: list[Tensor], sizes: list[int], kernels: list[str], schemes: list[str],
    experts: int, hidden: int, intermediate: int, activation: str,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x)
