"""Which weights of a layer of experts one call multiplies together, and the handle of such a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import NamedTuple
from weakref import WeakValueDictionary

from torch import Tensor

from quantport.errors import BackendError
from quantport.kernels.base import Packed
from quantport.kernels.grouped import GroupedKernel
from quantport.model.layers import PROJECTIONS
from quantport.modules import handles
from quantport.modules.expert_form import ExpertForm, parse_form
from quantport.modules.handles import BoundWeight

GroupWeights = Packed | Sequence[Packed]  # the stack of a ``GroupedKernel``, or each weight by itself


class Group(NamedTuple):
    """Weights of the experts ``first`` to ``last - 1`` that one call multiplies: ``shared`` for each expert.

    Attributes:
        name: Unique in the layer: ``gate_up_0``.
        bound: Kernel, scheme and shape of each weight.
        first: First expert.
        last: One past the last expert.
        members: The weights, expert by expert, as places in the order gate, up and down of expert 0, then of
            expert 1, and so on.
        shared: Weights of an expert that read the same rows: 2 for gate and up.
        column: Where its result starts in the columns of gate beside up.
    """

    name: str
    bound: BoundWeight
    first: int
    last: int
    members: tuple[int, ...]
    shared: int
    column: int

    def weight(self, weights: GroupWeights, group: int, which: int) -> Packed:
        """One packed weight."""
        kernel = self.bound.kernel
        if isinstance(kernel, GroupedKernel):
            return kernel.expert_view(weights, group, which)  # type: ignore[arg-type]  # a stack
        return weights[self.shared * group + which]  # type: ignore[return-value]  # each by itself


@dataclass(frozen=True, eq=False)
class ExpertLayout:
    """A layer of experts without its tensors.

    Attributes:
        gate_up: Groups of gate and up.
        down: Groups of down.
        experts: Number of experts.
        form: What is computed beside the products.
        handle: The text by which the operators find this.
        groups: All groups, those of down last.
        one_launch: Whether gate and up are one launch, and down is one: then the host need not know the
            routing.
    """

    gate_up: tuple[Group, ...]
    down: tuple[Group, ...]
    experts: int
    form: ExpertForm
    handle: str
    groups: tuple[Group, ...] = field(init=False)
    one_launch: bool = field(init=False)

    def __post_init__(self) -> None:
        groups = self.gate_up + self.down
        grouped = all(isinstance(group.bound.kernel, GroupedKernel) for group in groups)
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "one_launch", grouped and len(self.gate_up) == len(self.down) == 1)

    def weights(self, packed: Sequence[Tensor], sizes: Sequence[int]) -> list[GroupWeights]:
        """Takes a flat list of tensors apart again, group by group.

        Args:
            packed: The stack of each group, or the tensors of each of its weights; what follows is left.
            sizes: Number of tensors of one stack, or of one weight, for each group.
        """
        tensors, out = iter(packed), list[GroupWeights]()
        for group, size in zip(self.groups, sizes, strict=True):
            if isinstance(group.bound.kernel, GroupedKernel):
                out.append(tuple(islice(tensors, size)))
            else:
                out.append([tuple(islice(tensors, size)) for _ in group.members])
        return out


# As for handles of weights: layouts that names find again stay, others live as long as their modules.
_PORTABLE: dict[str, ExpertLayout] = {}
_BY_TOKEN: WeakValueDictionary[str, ExpertLayout] = WeakValueDictionary()


def bind_experts(weights: Mapping[str, BoundWeight], form: ExpertForm) -> ExpertLayout:
    """Groups the weights of a layer, under a handle that operators resolve.

    Args:
        weights: Name (``3.down_proj``) -> what it is bound to: gate, up and down of expert 0, then of
            expert 1, and so on.
        form: What is computed beside the products.
    """
    bound = list(weights.values())
    gate_up, down = bound[0].handle, bound[2].handle
    usual = {name: down if name.endswith(PROJECTIONS[2]) else gate_up for name in weights}
    unusual = [f"{name}={b.handle}" for name, b in weights.items() if b.handle != usual[name]]
    handle = ";".join((form.name, str(len(bound) // 3), gate_up, down, *unusual))
    table = _PORTABLE if form.gate is None and all(b.portable for b in bound) else _BY_TOKEN
    layout = table.get(handle)
    if (
        layout is None
        or layout.form.gate is not form.gate
        or any(group.bound is not bound[group.members[0]] for group in layout.groups)
    ):
        layout = table[handle] = _layout(bound, form, handle)
    return layout


def resolve_experts(handle: str) -> ExpertLayout:
    """What the handle of a layer of experts stands for.

    Raises:
        BackendError: this process has no such kernel, or the text is no handle.
        ConfigError: this process has no such scheme.
    """
    return _PORTABLE.get(handle) or _BY_TOKEN.get(handle) or _parsed(handle)


def _parsed(handle: str) -> ExpertLayout:
    """Binds the names of a handle that another process made."""
    name, *rest = handle.split(";")
    form = parse_form(name)
    if form is None or len(rest) < 3 or not rest[0].isdecimal() or any("=" not in part for part in rest[3:]):
        raise BackendError(
            f"run {handle!r}",
            "it is no handle of experts, or their gating function belongs to a model that is gone",
            "'activation;experts;gate_up;down'",
        )
    unusual = dict(part.split("=", 1) for part in rest[3:])
    names = [f"{e}.{p}" for e in range(int(rest[0])) for p in PROJECTIONS]
    usual = {name: rest[2] if name.endswith(PROJECTIONS[2]) else rest[1] for name in names}
    return bind_experts({name: handles.resolve(unusual.get(name, usual[name])) for name in names}, form)


def _layout(bound: Sequence[BoundWeight], form: ExpertForm, handle: str) -> ExpertLayout:
    down = _runs("down", bound, range(2, len(bound), 3))
    return ExpertLayout(tuple(_gate_up(bound)), tuple(down), len(bound) // 3, form, handle)


def _gate_up(bound: Sequence[BoundWeight]) -> Iterator[Group]:
    """One group for gate and up of experts where they share a kernel: their rows are then quantized once."""
    for same, run in groupby(range(0, len(bound), 3), key=lambda i: bound[i] is bound[i + 1]):
        gates = list(run)
        ups, first = [i + 1 for i in gates], gates[0] // 3
        if same:
            both = [i for pair in zip(gates, ups, strict=True) for i in pair]
            yield from _runs("gate_up", bound, both, first, 2)
        else:
            yield from _runs("gate", bound, gates, first)
            yield from _runs("up", bound, ups, first, column=bound[ups[0]].spec.n)


def _runs(
    name: str,
    bound: Sequence[BoundWeight],
    places: Sequence[int],
    first: int = 0,
    shared: int = 1,
    column: int = 0,
) -> Iterator[Group]:
    """Consecutive experts with one kernel and scheme."""
    start = first
    for _, run in groupby(places, key=lambda i: bound[i].handle):
        members = tuple(run)
        last = start + len(members) // shared
        yield Group(f"{name}_{start}", bound[members[0]], start, last, members, shared, column)
        start = last
