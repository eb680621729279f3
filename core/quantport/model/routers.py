"""Routers by structure: linear layers beside experts, the last with one output for each, whatever they are
called.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from quantport.model.roles import Role

if TYPE_CHECKING:
    from quantport.model.layers import Layer, TensorLike

_NUMBERED = re.compile(r"\D*(\d+)")  # ``3``, ``expert_3``
_MATRICES, _DEPTH = (
    4,
    3,
)  # most of one expert that only its place in a list shows: blocks with attention have more


class _Experts(NamedTuple):
    """Experts beside which there may be a router: how many, and what they read; nothing where names say what
    they are.
    """

    number: int
    inputs: frozenset[int] = frozenset()

    def may_route(self, first: Layer, last: Layer) -> bool:
        """Whether layers from one to another could choose among them."""
        inputs, outputs = first.weights[0][2], last.weights[0][1]
        return outputs == self.number and (not self.inputs or inputs in self.inputs)


def find_routers(layers: Iterable[Layer], tensors: Mapping[str, TensorLike]) -> Iterator[str]:
    """Names of the linear layers that route to experts.

    Such a layer stands beside the experts, or is the only layer of a module beside them (``gate.wg``), and
    has as many outputs as there are experts. Of a module of several layers beside them these are all, where
    each reads what another one gives, up to one with so many outputs.

    Experts are told by their name, or as a list of equal modules of few matrices that give as many columns as
    they read.

    Args:
        layers: From ``find_layers``.
        tensors: What they were found in.
    """
    lists = _lists(tensors)
    experts = {parent: [_Experts(count)] for parent, count in _expert_counts(tensors).items()}
    for path, found in lists.items():
        experts.setdefault(_parent(path), []).append(found)
    if not experts:
        return
    linear = [x for x in layers if x.kind == "linear" and x.role not in (Role.EMBEDDING, Role.HEAD)]
    siblings = Counter(_parent(layer.name) for layer in linear)
    modules: dict[str, list[Layer]] = {}
    for layer in linear:
        parent = _parent(layer.name)
        beside = [parent, _parent(parent)] if parent and siblings[parent] == 1 else [parent]
        if any(one.may_route(layer, layer) for path in beside for one in experts.get(path, ())):
            yield layer.name
        if parent and parent not in lists and siblings[parent] > 1:
            modules.setdefault(parent, []).append(layer)
    for module, own in modules.items():
        for one in experts.get(_parent(module), ()):
            if (first := _start(own, one.number)) and one.may_route(first[0], first[1]):
                yield from (layer.name for layer in own)


def _start(layers: Sequence[Layer], outputs: int) -> tuple[Layer, Layer] | None:
    """The first and the last of layers of which each reads what another one gives, up to one with these
    outputs; None of others.
    """
    left = list(layers)
    last = first = next((layer for layer in left if layer.weights[0][1] == outputs), None)
    while first is not None and last is not None:
        left.remove(first)
        if not left:
            return first, last
        wanted = first.weights[0][2]
        first = next((layer for layer in left if layer.weights[0][1] == wanted), None)
    return None


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _lists(tensors: Mapping[str, TensorLike]) -> dict[str, _Experts]:
    """Lists of equal modules that may be experts, by path; not those that are called so."""
    found: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {}
    for name, tensor in tensors.items():
        path = name.split(".")
        for i in range(max(1, len(path) - 1 - _DEPTH), len(path) - 1):
            if path[i].isdecimal() and len(path[i]) < 6 and "expert" not in name:
                items = found.setdefault(".".join(path[:i]), {})
                items.setdefault(int(path[i]), {})[".".join(path[i + 1 :])] = tuple(tensor.shape)
    out = dict[str, _Experts]()
    for place, items in found.items():
        first = items.get(0, {})
        matrices = [shape for shape in first.values() if len(shape) == 2]
        rows, columns = frozenset(n for n, _ in matrices), frozenset(k for _, k in matrices)
        even = (
            len(items) > 1 and max(items) == len(items) - 1 and all(item == first for item in items.values())
        )
        if even and 0 < len(matrices) <= _MATRICES and rows == columns:  # they give what they read
            out[place] = _Experts(len(items), columns)
    return out


def _expert_counts(tensors: Mapping[str, TensorLike]) -> dict[str, int]:
    """How many experts there are, by the path of the module that holds them: two or more."""
    numbers: dict[str, set[int]] = {}
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        path = name.split(".")
        place = next((i for i, p in enumerate(path[:-1]) if "expert" in p and "shared" not in p), None)
        if place is None:
            continue
        parent = ".".join(path[:place])
        if len(tensor.shape) == 3:
            counts[parent] = tensor.shape[0]
        elif len(path) > place + 2 and (match := _NUMBERED.fullmatch(path[place + 1])):
            numbers.setdefault(parent, set()).add(int(match[1]))
    counts |= {parent: len(own) for parent, own in numbers.items()}
    return {parent: count for parent, count in counts.items() if count > 1}
