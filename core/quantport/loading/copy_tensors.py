"""Copies tensors that stay as they are, slab by slab, so that no large one is in memory twice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from quantport.checkpoint import Rows, TensorSource
from quantport.loading.destination import Put

SLAB = 16 << 20  # bytes of a tensor that are read at a time
HELD = (
    3  # slabs that copying one tensor holds at most: with the one that is read, that cast to twice its bytes
)
_CHECKED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class ValueRange:
    """The smallest and the largest finite value of a tensor that is seen slab by slab.

    Attributes:
        finite: Whether every value is.
        nan: Whether one is NaN.
    """

    def __init__(self) -> None:
        self.finite, self.nan = True, False
        self._low, self._high = math.inf, -math.inf

    def add(self, values: Tensor) -> None:
        """Sees a slab; of a dtype that is no plain float it sees nothing."""
        if values.dtype not in _CHECKED or not values.numel():
            return
        low, high = (float(bound) for bound in torch.aminmax(values))  # NaN where any value is
        if not (math.isfinite(low) and math.isfinite(high)):
            self.finite, self.nan = False, self.nan or math.isnan(low)
            self.add(values[values.isfinite()])
        else:
            self._low, self._high = min(self._low, low), max(self._high, high)

    def lost_in(self, dtype: torch.dtype) -> str:
        """How the values collapse in another dtype: some become Inf, or all become one; empty where they do
        not.
        """
        if self._low > self._high:
            return ""
        bounds = torch.tensor([self._low, self._high], dtype=torch.float64, device="cpu")
        low, high = bounds.to(dtype).tolist()  # rounding keeps the order
        if math.isinf(low) or math.isinf(high):
            return f"values from {self._low:.4g} to {self._high:.4g} become infinite"
        if low == high and (self._low != self._high or (not low and self._low)):
            return f"values from {self._low:.6g} to {self._high:.6g} all become {low:.6g}"
        return ""


def copy_tensor(
    source: TensorSource, put: Put, name: str, slab: int = SLAB, transposed: bool = False
) -> ValueRange:
    """Puts a tensor somewhere slab by slab, giving the pages of each back before the next is read; returns
    what it saw. Where it is put transposed, each matrix of a 3-D tensor is a slab.
    """
    seen, shape = ValueRange(), source.tensors[name].shape
    each: Iterable[Rows | None] = slabs(shape, source.tensors[name].nbytes, slab)
    if transposed:
        each = ((e, slice(None)) for e in range(shape[0]))
    for rows in each:
        values = source.read(name, rows)
        seen.add(values)
        put(values.T if transposed else values)
        source.release(name, rows)
    return seen


def slabs(shape: tuple[int, ...], size: int, slab: int) -> Iterator[Rows | None]:
    """Rows of a tensor, or of each matrix of a 3-D one: the experts of a layer may be larger than any
    slab. Of a tensor without elements one slab, if any, that has none.
    """
    if not shape:
        yield None
    elif len(shape) == 3 and shape[0]:
        yield from ((e, rows) for e in range(shape[0]) for rows in _rows(shape[1], size // shape[0], slab))
    else:
        yield from _rows(shape[0], size, slab)


def _rows(count: int, size: int, slab: int) -> Iterator[slice]:
    step = max(1, slab * count // max(1, size))
    return (slice(i, min(i + step, count)) for i in range(0, max(1, count), step))
