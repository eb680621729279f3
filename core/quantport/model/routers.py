"""Routers by structure: a linear layer beside experts, with one output for each, whatever it is called."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from quantport.model.roles import Role

if TYPE_CHECKING:
    from quantport.model.layers import Layer, TensorLike

_NUMBERED = re.compile(r"\D*(\d+)")  # ``3``, ``expert_3``


def find_routers(layers: Iterable[Layer], tensors: Mapping[str, TensorLike]) -> Iterator[str]:
    """Names of the linear layers that route to experts.

    Such a layer stands beside the experts, or is the only layer of a module beside them (``gate.wg``), and
    has as many outputs as there are experts.

    Args:
        layers: From ``find_layers``.
        tensors: What they were found in.
    """
    counts = _expert_counts(tensors)
    if not counts:
        return
    linear = [x for x in layers if x.kind == "linear" and x.role not in (Role.EMBEDDING, Role.HEAD)]
    siblings = Counter(layer.name.rpartition(".")[0] for layer in linear)
    for layer in linear:
        parent = layer.name.rpartition(".")[0]
        beside = [parent]
        if parent and siblings[parent] == 1:
            beside.append(parent.rpartition(".")[0])
        if any(counts.get(path) == layer.weights[0][1] for path in beside):
            yield layer.name


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
