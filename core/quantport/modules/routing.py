"""Runs routed experts: only the tokens that were routed to an expert are multiplied by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from quantport.errors import RoutingError, ShapeError
from quantport.kernels.base import Packed
from quantport.kernels.grouped import GroupedKernel, loop_over_groups, rotated
from quantport.modules.expert_layout import ExpertLayout, Group, GroupWeights
from quantport.modules.handles import BoundWeight

_FEW_SLOTS = 256
Multiply = Callable[[BoundWeight, Tensor, Packed, Tensor | None], Tensor]


class Routes(NamedTuple):
    """Slots, each a token and one of its experts, in the order of their experts.

    Attributes:
        order: The slots ``[S]`` that are multiplied.
        offsets: int32 ``[experts + 1]``: where each expert starts, and the last one ends at S.
        bounds: ``offsets`` on the host, or None where the host need not know.
        nowhere: bool ``[S]``: slots that go nowhere and are multiplied all the same, since the host does not
            know their number; None where they are left out.
        wrong: bool ``[S]``: slots of experts that the layer does not have, where neither host nor device
            refuses them; None where one does.
    """

    order: Tensor
    offsets: Tensor
    bounds: Sequence[int] | None
    nowhere: Tensor | None = None
    wrong: Tensor | None = None


def run_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    layout: ExpertLayout,
    packed: Sequence[GroupWeights],
    biases: Sequence[Tensor] = (),
    multiply: Multiply | None = None,
) -> Tensor:
    """Computes ``sum_j weights[t, j] * down(act(gate(x[t])) * up(x[t]))`` over the experts ``index[t, j]``,
    with what the form of the layout has in place of ``act(gate) * up``.

    Args:
        x: ``[T, hidden]``.
        index: int ``[T, top_k]``; an entry below 0, or equal to the number of experts, is a token that
            goes nowhere.
        weights: ``[T, top_k]``.
        layout: The layer.
        packed: The weights of each group of the layout.
        biases: As the form of the layout names them: ``[experts, 2 * intermediate]``, ``[experts, hidden]``.
        multiply: How one weight is multiplied, where it must not be the kernel alone.

    Returns:
        ``[T, hidden]`` in the dtype of ``x``. The products of a token are added in fp32.

    Raises:
        RoutingError: an entry above the number of experts, or shapes that do not belong together. Where the
            host does not wait for the device, the former is an assertion of the device; a device that has
            none gives NaN for the token.
        ShapeError: activations of another width.
    """
    width, hidden = layout.gate_up[0].bound.spec.n, layout.gate_up[0].bound.spec.k
    if index.shape != weights.shape or index.dim() != 2 or index.shape[0] != x.shape[0]:
        found = f"index {list(index.shape)}, weights {list(weights.shape)}, activations {list(x.shape)}"
        raise RoutingError(
            "route tokens to experts", found, "index and weights [T, top_k] for activations [T, hidden]"
        )
    if x.shape[-1] != hidden:
        raise ShapeError(
            f"run experts on {list(x.shape)}", f"experts of {hidden} inputs", "activations of that width"
        )
    if len(x) == 1 and multiply is None and x.is_cpu:
        one = _one_token(layout, x, index, weights, packed)
        if one is not None:
            return one
    on_device = layout.one_launch and multiply is None and not x.is_cpu
    routes = (_sort_on_device if on_device else _sort)(index.reshape(-1).long(), layout.experts)
    rows = x[routes.order // index.shape[1]]
    y = None if multiply else _gated(layout, rows, routes.offsets, packed)
    if y is None:
        split = len(layout.gate_up)
        gate_up = _apply(layout.gate_up, packed[:split], rows, routes, 2 * width, multiply)
        experts = _experts_of(routes, index, layout.experts) if biases else None
        between = layout.form.between(gate_up, biases, experts)
        y = _apply(layout.down, packed[split:], between, routes, hidden, multiply)
        if biases:
            y = y + biases[1][experts]
    y = y * weights.reshape(-1)[routes.order, None]
    if routes.nowhere is not None:
        y = y.masked_fill(routes.nowhere[:, None], 0)
    if routes.wrong is not None:
        y = y.masked_fill(routes.wrong[:, None], torch.nan)
    all_slots = routes.order.numel() == index.numel()
    out = (y.new_empty if all_slots else y.new_zeros)(index.numel(), hidden)
    out[routes.order] = y
    return out.view(*index.shape, hidden).sum(1, dtype=torch.float32).to(x.dtype)


def _experts_of(routes: Routes, index: Tensor, experts: int) -> Tensor:
    """The expert of each slot that is multiplied, a valid one for those that go nowhere."""
    return index.reshape(-1)[routes.order].long().clamp(0, experts - 1)


def _whole(layout: ExpertLayout) -> GroupedKernel | None:
    """The kernel that could compute experts as a whole, activation included."""
    kernel = layout.gate_up[0].bound.kernel
    if not layout.form.plain or not layout.one_launch or not isinstance(kernel, GroupedKernel):
        return None
    first, last = layout.gate_up[0], layout.down[0]
    if kernel.name != last.bound.kernel.name or first.shared != 2:
        return None
    return None if first.bound.spec.scheme.rotation else kernel


def _gated(layout: ExpertLayout, x: Tensor, offsets: Tensor, packed: Sequence[GroupWeights]) -> Tensor | None:
    """The whole of the experts by a kernel that can do so, or None."""
    kernel = _whole(layout)
    if kernel is None or not len(x):
        return None
    gate_up, down = packed
    specs = layout.gate_up[0].bound.spec, layout.down[0].bound.spec
    return kernel.run_gated(x, offsets, gate_up, down, specs, layout.form.activation)  # type: ignore[arg-type]  # stacks


def _one_token(
    layout: ExpertLayout, x: Tensor, index: Tensor, weights: Tensor, packed: Sequence[GroupWeights]
) -> Tensor | None:
    """The experts of one token by a kernel that can do so on the host, or None."""
    kernel = _whole(layout)
    if kernel is None:
        return None
    experts: list[int] = index[0].tolist()
    if not experts or min(experts) < 0 or max(experts) >= layout.experts:
        return None
    gate_up, down = packed
    specs = layout.gate_up[0].bound.spec, layout.down[0].bound.spec
    return kernel.run_token(x, experts, weights, gate_up, down, specs, layout.form.activation)  # type: ignore[arg-type]  # stacks


def _apply(
    groups: Sequence[Group],
    packed: Sequence[GroupWeights],
    x: Tensor,
    routes: Routes,
    width: int,
    multiply: Multiply | None,
) -> Tensor:
    """Multiplies rows sorted by expert: ``[T, K]`` to ``[T, width]``."""
    if len(groups) == 1:
        return _one_group(groups[0], packed[0], x, routes.offsets, routes.bounds, multiply)
    assert routes.bounds is not None  # several groups are several launches, over spans that the host knows
    out = x.new_empty(x.shape[0], width)
    for group, weights in zip(groups, packed, strict=True):
        bounds = routes.bounds[group.first : group.last + 1]
        start, stop = bounds[0], bounds[-1]
        if start < stop:
            own = routes.offsets[group.first : group.last + 1] - start
            y = _one_group(group, weights, x[start:stop], own, [b - start for b in bounds], multiply)
            out[start:stop, group.column : group.column + y.shape[1]] = y
    return out


def _one_group(
    group: Group,
    weights: GroupWeights,
    x: Tensor,
    offsets: Tensor,
    bounds: Sequence[int] | None,
    multiply: Multiply | None,
) -> Tensor:
    kernel, spec = group.bound.kernel, group.bound.spec
    if multiply is None and isinstance(kernel, GroupedKernel):
        return kernel.apply_grouped(x, offsets, weights, None, spec, group.shared)  # type: ignore[arg-type]  # a stack
    assert bounds is not None  # a loop needs them

    def run(rows: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        return kernel.run(rows, packed, bias, spec)

    if multiply is None:
        x = rotated(x, spec)
    else:
        run = partial(multiply, group.bound)
    return loop_over_groups(run, x, bounds, partial(group.weight, weights), None, spec.n, group.shared)


@cache
def _asserts(device_type: str) -> bool:
    """Whether a device can refuse a tensor by itself."""
    key = torch._C._dispatch_key_for_device(device_type)
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_assert_async.msg", key)


def _sorted(flat: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots in the order of their experts, those that go nowhere last; their experts; and, int32
    ``[experts + 2]``, how many slots lie below each.
    """
    flat = torch.where(flat < 0, experts, flat)
    order = torch.argsort(flat, stable=True)
    values = flat.index_select(0, order)
    edges = torch.arange(experts + 2, dtype=values.dtype, device=values.device)
    return order, values, torch.searchsorted(values, edges, out_int32=True)


def _above(experts: int, count: str) -> RoutingError:
    return RoutingError(
        f"route tokens to {experts} experts",
        f"{count} above it",
        f"0 to {experts - 1}; -1 or {experts} for nowhere",
    )


def _sort(flat: Tensor, experts: int) -> Routes:
    """Routes that the host knows: the one time that it waits for an accelerator.

    Raises:
        RoutingError: an entry is above the number of experts.
    """
    if flat.is_cpu and flat.numel() <= _FEW_SLOTS:
        return _sort_few(flat, experts)
    order, _, below = _sorted(flat, experts)
    bounds: list[int] = below.tolist()
    if bounds[-1] != flat.numel():
        raise _above(experts, f"{flat.numel() - bounds[-1]} entries")
    return Routes(order[: bounds[experts]], below[: experts + 1], bounds[: experts + 1])


def _sort_few(flat: Tensor, experts: int) -> Routes:
    """As ``_sort`` for a few slots on the host, where torch's operators take longer than Python."""
    values = [experts if v < 0 else v for v in flat.tolist()]
    wrong = sum(v > experts for v in values)
    if wrong:
        raise _above(experts, f"{wrong} entries")
    counts = Counter(values)
    bounds = [0, *accumulate(counts[e] for e in range(experts))]
    order = sorted(range(len(values)), key=values.__getitem__)[: bounds[-1]]
    offsets = torch.tensor(bounds, dtype=torch.int32, device=flat.device)
    return Routes(torch.tensor(order, dtype=torch.int64, device=flat.device), offsets, bounds)


def _sort_on_device(flat: Tensor, experts: int) -> Routes:
    """Routes that only the device knows. Slots that go nowhere count as the last expert's: no shape depends
    on their number.
    """
    asserts = _asserts(flat.device.type)
    if asserts:
        torch._assert_async((flat <= experts).all(), str(_above(experts, "an entry")))
    order, values, below = _sorted(flat, experts)
    offsets = below[: experts + 1]
    offsets[experts:].fill_(flat.numel())
    return Routes(order, offsets, None, values >= experts, None if asserts else values > experts)
