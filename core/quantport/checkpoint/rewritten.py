"""Tensors on their way to a file, as another format wants them: under other names, as other dtypes and
shapes, and with further ones beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
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


@dataclass(frozen=True)
class Joined:
    """Tensors of one weight that are written as others, once all rows of all of them are there.

    Attributes:
        stem: What their names begin with, which a dot and a key of a layout follow.
        given: Those that come.
        written: Those that are in the file.
        convert: Makes these of those, on the host.
    """

    stem: str
    given: TensorLayout
    written: TensorLayout
    convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def rewritten(
    tensors: Stream | Fill,
    layout: TensorLayout | None,
    changes: Mapping[str, Rewrite],
    further: Mapping[str, Tensor],
    joined: Iterable[Joined] = (),
) -> tuple[Stream | Fill, TensorLayout | None]:
    """Tensors for `save_tensors`, changed.

    Args:
        tensors: As for `save_tensors`.
        layout: As for `save_tensors`.
        changes: By the name that a tensor is given under; others are written as they are.
        further: Small tensors that are written too.
        joined: Weights that are held in whole before they are written.
    """
    rewriter = _Rewriter(changes, joined)
    if layout is not None:
        changed = rewriter.layout(layout)
        layout = {**changed, **{name: (tuple(t.shape), t.dtype) for name, t in further.items()}}
    if callable(tensors):
        return _filled(tensors, rewriter, further), layout
    return _streamed(tensors, rewriter, further), layout


class _Rewriter:
    """Pieces of tensors as they are written; holds rows until there are as many as go together."""

    def __init__(self, changes: Mapping[str, Rewrite], joined: Iterable[Joined]) -> None:
        self._changes, self._held = changes, dict[str, Tensor]()
        whole = [_Whole(weight) for weight in joined]
        self._whole = {f"{w.of.stem}.{key}": (w, key) for w in whole for key in w.of.given}
        given = {change.name: {name} for name, change in changes.items()}
        for w in whole:
            names = {f"{w.of.stem}.{key}" for key in w.of.given}
            given |= {f"{w.of.stem}.{key}": names for key in w.of.written}
        self._given = given

    def layout(self, layout: TensorLayout) -> TensorLayout:
        out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, spec in layout.items():
            if name in self._whole:
                of = self._whole[name][0].of
                out |= {f"{of.stem}.{key}": made for key, made in of.written.items()}
            else:
                change = self._changes.get(name, Rewrite(name))
                out[change.name] = change.spec or spec
        return out

    def given(self, written: str) -> Set[str]:
        """The names under which what makes a written tensor comes."""
        return self._given.get(written, {written})

    def written(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What a tensor, or the next rows of one, gives to write."""
        if name in self._whole:
            weight, key = self._whole[name]
            for made, value in weight.add(key, tensor).items():
                yield f"{weight.of.stem}.{made}", value
            return
        change = self._changes.get(name, Rewrite(name))
        if change.together > 1:
            tensor = torch.cat((self._held.pop(name), tensor)) if name in self._held else tensor
            ready = len(tensor) // change.together * change.together
            if ready < len(tensor):
                self._held[name] = tensor[ready:].clone()
                tensor = tensor[:ready]
            if not ready:
                return
        yield change.name, change.rows(tensor)


class _Whole:
    """Holds the rows of a weight that have come."""

    def __init__(self, of: Joined) -> None:
        self.of = of
        self._held: dict[str, Tensor] = {}
        self._next = dict.fromkeys(of.given, 0)

    def add(self, key: str, rows: Tensor) -> Mapping[str, Tensor]:
        """Takes the next rows of a tensor; with the last of all it returns what is written, otherwise
        nothing.
        """
        if key not in self._held:
            shape, dtype = self.of.given[key]
            self._held[key] = torch.empty(shape, dtype=dtype, device="cpu")
        start, stop = self._next[key], self._next[key] + len(rows)
        self._held[key][start:stop] = rows
        self._next[key] = stop
        if any(self._next[name] < shape[0] for name, (shape, _) in self.of.given.items()):
            return {}
        held, self._held = self._held, {}
        return self.of.convert(held)


def _streamed(tensors: Stream, rewriter: _Rewriter, further: Mapping[str, Tensor]) -> Stream:
    for name, tensor in tensors:
        yield from rewriter.written(name, tensor)
        del tensor  # while the stream makes the next one, nothing holds this one
    yield from further.items()


def _filled(fill: Fill, rewriter: _Rewriter, further: Mapping[str, Tensor]) -> Fill:
    def run(missing: Set[str], write: Write) -> None:
        def written(name: str, tensor: Tensor) -> None:
            for made, value in rewriter.written(name, tensor):
                if made in missing:  # of a joined weight some may be in files that are whole
                    write(made, value)

        for name, tensor in further.items():
            if name in missing:
                write(name, tensor)
        wanted = set[str]().union(*map(rewriter.given, missing - further.keys()))
        fill(wanted, written)

    return run
