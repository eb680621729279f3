"""Copies tensors that stay as they are, slab by slab, so that no large one is in memory twice."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from quantport.checkpoint import Rows, TensorSource

SLAB = 16 << 20  # bytes of source pages that copying one tensor holds


def copy_into(source: TensorSource, target: Tensor, name: str, slab: int = SLAB) -> None:
    """Copies a tensor, giving the pages of each slab back before the next is read."""
    for rows in _slabs(source.tensors[name].shape, source.tensors[name].nbytes, slab):
        target[... if rows is None else rows].copy_(source.read(name, rows))
        source.release(name, rows)


def _slabs(shape: tuple[int, ...], size: int, slab: int) -> Iterator[Rows | None]:
    """Rows of a tensor, or of each matrix of a 3-D one: the experts of a layer may be larger than any
    slab.
    """
    if not shape:
        yield None
    elif len(shape) == 3 and shape[0]:
        yield from ((e, rows) for e in range(shape[0]) for rows in _rows(shape[1], size // shape[0], slab))
    else:
        yield from _rows(shape[0], size, slab)


def _rows(count: int, size: int, slab: int) -> Iterator[slice]:
    step = max(1, slab * count // max(1, size))
    return (slice(i, min(i + step, count)) for i in range(0, count, step))
