"""Runs routed experts: only the tokens that were routed to an expert are multiplied by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quantport.errors import RoutingError, ShapeError
from quantport.kernels.base import Kernel, WeightSpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Weight(NamedTuple):
    """One packed weight with its kernel."""

    kernel: Kernel
    spec: WeightSpec
    packed: Any  # ``Packed``, or a name where only the grouping is asked


class Group(NamedTuple):
    """Weights of the experts ``first`` to ``last - 1`` that one call multiplies: ``shared`` for each
    expert.
    """

    kernel: Kernel
    spec: WeightSpec
    first: int
    last: int
    packed: Sequence[Any]
    shared: int
    column: int


class Tables(NamedTuple):
    """The weights of a layer as groups, ready to run: gate beside up, and down."""

    gate_up: tuple[Group, ...]
    down: tuple[Group, ...]
    experts: int


def tables(weights: Sequence[Weight]) -> Tables:
    """Groups gate, up and down of expert 0, then of expert 1, and so on."""
    gate_up, down = (
        tuple(g._replace(packed=g.kernel.bundle(g.packed, g.shared)) for g in part)
        for part in groups(weights)
    )
    return Tables(gate_up, down, len(weights) // 3)


def groups(weights: Sequence[Weight]) -> tuple[list[Group], list[Group]]:
    """Groups of gate and up, and of down, with the weights as they are. Where all share a kernel there is one
    of each.
    """
    gate, up, down = (weights[i::3] for i in range(3))
    return list(_gate_up(gate, up)), list(_runs(down, 0))


def _key(weight: Weight) -> tuple[str, WeightSpec]:
    return weight.kernel.name, weight.spec


def _gate_up(gate: Sequence[Weight], up: Sequence[Weight]) -> Iterator[Group]:
    """One group for gate and up of experts where they share a kernel: their rows are then quantized once."""
    pairs = list(enumerate(zip(gate, up, strict=True)))
    for same, run in groupby(pairs, key=lambda item: _key(item[1][0]) == _key(item[1][1])):
        members = list(run)
        first = members[0][0]
        gates, ups = [g for _, (g, _) in members], [u for _, (_, u) in members]
        if same:
            yield from _runs([w for pair in zip(gates, ups, strict=True) for w in pair], first, 2)
        else:
            yield from _runs(gates, first)
            yield from _runs(ups, first, column=ups[0].spec.n)


def _runs(weights: Sequence[Weight], first: int, shared: int = 1, column: int = 0) -> Iterator[Group]:
    """Consecutive experts with one kernel and scheme."""
    start = first
    for _, run in groupby(weights, key=_key):
        members = list(run)
        last = start + len(members) // shared
        kernel, spec, _ = members[0]
        yield Group(kernel, spec, start, last, [w.packed for w in members], shared, column)
        start = last


def apply(groups: Sequence[Group], x: Tensor, offsets: Tensor, bounds: Sequence[int], width: int) -> Tensor:
    """Multiplies rows sorted by expert: ``[T, K]`` to ``[T, width]``."""
    if len(groups) == 1:
        only = groups[0]
        return only.kernel.apply_grouped(x, offsets, only.packed, None, only.spec, only.shared)
    out = x.new_empty(x.shape[0], width)
    for group in groups:
        start, stop = bounds[group.first], bounds[group.last]
        if start < stop:
            own = offsets[group.first : group.last + 1] - start
            y = group.kernel.apply_grouped(x[start:stop], own, group.packed, None, group.spec, group.shared)
            out[start:stop, group.column : group.column + y.shape[1]] = y
    return out


def run_experts(x: Tensor, index: Tensor, weights: Tensor, layer: Tables, activation: str) -> Tensor:
    """Computes ``sum_j weights[t, j] * down(act(gate(x[t])) * up(x[t]))`` over the experts ``index[t, j]``.

    Args:
        x: ``[T, hidden]``.
        index: int ``[T, top_k]``; an entry below 0, or equal to the number of experts, is a token that
            goes nowhere.
        weights: ``[T, top_k]``.
        layer: Every weight, grouped.
        activation: A name in ``ACTIVATIONS``.

    Returns:
        ``[T, hidden]`` in the dtype of ``x``. The products of a token are added in fp32.

    Raises:
        RoutingError: an entry above the number of experts, or shapes that do not belong together.
        ShapeError: activations of another width.
    """
    if index.shape != weights.shape or index.dim() != 2 or index.shape[0] != x.shape[0]:
        found = f"index {list(index.shape)}, weights {list(weights.shape)}, activations {list(x.shape)}"
        raise RoutingError(
            "route tokens to experts", found, "index and weights [T, top_k] for activations [T, hidden]"
        )
    if x.shape[-1] != layer.gate_up[0].spec.k:
        raise ShapeError(
            f"run experts on {list(x.shape)}",
            f"experts of {layer.gate_up[0].spec.k} inputs",
            "activations of that width",
        )
    order, offsets, bounds = _sort(index.reshape(-1), layer.experts)
    order = order[: bounds[-1]]
    rows = x[order // index.shape[1]]
    y = _gated(layer, rows, offsets, activation)
    if y is None:
        width = layer.gate_up[0].spec.n
        gate_up = apply(layer.gate_up, rows, offsets, bounds, 2 * width)
        hidden = ACTIVATIONS[activation](gate_up[:, :width]) * gate_up[:, width:]
        y = apply(layer.down, hidden, offsets, bounds, x.shape[1])
    y = y * weights.reshape(-1)[order, None]
    out = (
        y.new_empty(index.numel(), x.shape[1])
        if bounds[-1] == index.numel()
        else y.new_zeros(index.numel(), x.shape[1])
    )
    out[order] = y
    return out.view(*index.shape, x.shape[1]).sum(1, dtype=torch.float32).to(x.dtype)


def _gated(layer: Tables, x: Tensor, offsets: Tensor, activation: str) -> Tensor | None:
    """The whole of the experts by a kernel that can do so, or None."""
    first, last = layer.gate_up[0], layer.down[0]
    single = len(layer.gate_up) == len(layer.down) == 1 and first.kernel.name == last.kernel.name
    if not single or first.shared != 2 or first.spec.scheme.rotation or not len(x):
        return None
    return first.kernel.run_gated(x, offsets, first.packed, last.packed, (first.spec, last.spec), activation)


def _sort(flat: Tensor, experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Slots in the order of their experts, those that go nowhere last; where each expert starts, also on the
    host.

    Raises:
        RoutingError: an entry is above the number of experts.
    """
    flat = torch.where(flat < 0, experts, flat.clamp(max=experts + 1))
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts + 2)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    bounds = offsets.tolist()  # the one time that the host waits for the device
    if bounds[-1] != bounds[-2]:
        found = f"{bounds[-1] - bounds[-2]} entries above it"
        raise RoutingError(
            f"route tokens to {experts} experts", found, f"0 to {experts - 1}; -1 or {experts} for nowhere"
        )
    return order, offsets[: experts + 1].to(torch.int32), bounds[: experts + 1]
