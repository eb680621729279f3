"""Tensors on their way to a file, as another format wants them: under other names, as other dtypes and
shapes, and with further ones beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
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
        together: ``convert`` takes a multiple of so many rows.
    """

    name: str
    convert: Callable[[Tensor], Tensor] | None = None
    spec: tuple[tuple[int, ...], torch.dtype] | None = None
    together: int = 1

    def rows(self, tensor: Tensor) -> Tensor:
        """What is written for some rows."""
        return tensor if self.convert is None else self.convert(tensor)


class _Changed:
    """Pieces of tensors as they are written; holds rows until there are as many as go together."""

    def __init__(self, changes: Mapping[str, Rewrite]) -> None:
        self._changes, self._held = changes, dict[str, Tensor]()

    def __call__(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        change = self._changes.get(name, Rewrite(name))
        if change.together > 1:
            tensor = torch.cat((self._held.pop(name), tensor)) if name in self._held else tensor
            whole = tensor.shape[0] // change.together * change.together
            if whole < tensor.shape[0]:
                self._held[name] = tensor[whole:].clone()
                tensor = tensor[:whole]
        if tensor.shape[0]:
            yield change.name, change.rows(tensor)


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
    changed = _Changed(changes)
    for name, tensor in tensors:
        yield from changed(name, tensor)
        del tensor  # while the stream makes the next one, nothing holds this one
    yield from further.items()


def _filled(fill: Fill, changes: Mapping[str, Rewrite], further: Mapping[str, Tensor]) -> Fill:
    given = {change.name: name for name, change in changes.items()}

    def run(missing: Set[str], write: Write) -> None:
        changed = _Changed(changes)

        def written(name: str, tensor: Tensor) -> None:
            for piece in changed(name, tensor):
                write(*piece)

        for name, tensor in further.items():
            if name in missing:
                write(name, tensor)
        fill({given.get(name, name) for name in missing} - set(further), written)

    return run
