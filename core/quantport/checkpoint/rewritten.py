"""Tensors on their way to a file, as another format wants them: under other names, as other dtypes and
shapes, and with further ones beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from quantport.checkpoint.shard import Fill, Stream, TensorLayout, Write


@dataclass(frozen=True)
class Rewrite:
    """How a tensor is written.

    Attributes:
        name: Its name in the file.
        convert: Makes rows of the written tensor out of rows of the given one; None for the same.
        spec: Shape and dtype of the written tensor; None for those of the given one.
    """

    name: str
    convert: Callable[[Tensor], Tensor] | None = None
    spec: tuple[tuple[int, ...], torch.dtype] | None = None

    def rows(self, tensor: Tensor) -> Tensor:
        """What is written for some rows."""
        return tensor if self.convert is None else self.convert(tensor)


def rewritten(
    tensors: Stream | Fill,
    layout: TensorLayout | None,
    changes: Mapping[str, Rewrite],
    further: Mapping[str, Tensor],
) -> tuple[Stream | Fill, TensorLayout | None]:
    """Tensors for `save_tensors`, changed.

    Args:
        tensors: As for `save_tensors`.
        layout: As for `save_tensors`.
        changes: By the name that a tensor is given under; others are written as they are.
        further: Small tensors that are written too.
    """
    if layout is not None:
        changed = {}
        for name, spec in layout.items():
            change = changes.get(name, Rewrite(name))
            changed[change.name] = change.spec or spec
        layout = {**changed, **{name: (tuple(t.shape), t.dtype) for name, t in further.items()}}
    if callable(tensors):
        return _filled(tensors, changes, further), layout
    return _streamed(tensors, changes, further), layout


def _streamed(tensors: Stream, changes: Mapping[str, Rewrite], further: Mapping[str, Tensor]) -> Stream:
    for name, tensor in tensors:
        change = changes.get(name)
        yield (name, tensor) if change is None else (change.name, change.rows(tensor))
        del tensor  # while the stream makes the next one, nothing holds this one
    yield from further.items()


def _filled(fill: Fill, changes: Mapping[str, Rewrite], further: Mapping[str, Tensor]) -> Fill:
    given = {change.name: name for name, change in changes.items()}

    def run(missing: Set[str], write: Write) -> None:
        def written(name: str, tensor: Tensor) -> None:
            change = changes.get(name, Rewrite(name))
            write(change.name, change.rows(tensor))

        for name, tensor in further.items():
            if name in missing:
                write(name, tensor)
        fill({given.get(name, name) for name in missing} - set(further), written)

    return run
