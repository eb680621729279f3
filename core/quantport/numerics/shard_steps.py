"""Quantizes one rank's shard of a weight in two passes, so that ranks need each other only between them.

The first finds the largest magnitudes that scales follow from, of this shard; once those of all ranks are
known, the second quantizes, some rows at a time, to what the shard is of the whole weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from quantport.numerics.blocks import Reduce, check_finite
from quantport.numerics.by_rows import QuantizedRows, ReadRows, spans_rows
from quantport.numerics.linear import quantize_weight
from quantport.numerics.sharding import alignment
from quantport.scheme import Scheme


class SharedMaxima:
    """The largest magnitudes over all shards of one weight, in the order in which its scales ask for them.

    Args:
        scheme: The scheme.
        dim: The dimension that is split.
        shape: ``(n, k)`` of the shard.
        name: Of the weight, for errors.
        nonfinite: ``error`` refuses NaN and Inf; ``zero`` reads each of them as 0.

    Attributes:
        found: What `find_next` has found last.
    """

    def __init__(
        self, scheme: Scheme, dim: int, shape: tuple[int, int], name: str = "weight", nonfinite: str = "error"
    ) -> None:
        self.scheme, self.dim, self.name, self.nonfinite = scheme, dim, name, nonfinite
        self.n, self.k = shape
        self.found: Tensor | None = None
        self._agreed: list[Tensor] = []

    @property
    def complete(self) -> bool:
        """Whether the ranks have agreed on all of them. It does not depend on the values, so that all ranks
        say the same.
        """
        return len(self._agreed) == _count(self.scheme, self.dim)

    def agree(self, maxima: Tensor) -> None:
        """Takes the maximum over all ranks of what each has found last."""
        self._agreed.append(maxima)
        self.found = None

    def find_next(self, read: ReadRows, rows: int) -> None:
        """Finds the magnitudes to agree on next, as this shard has them: fp32.

        Args:
            read: Gives rows of the shard.
            rows: To read at a time.

        Raises:
            WeightError: the shard holds NaN or Inf while ``nonfinite="error"``.
        """
        found = []
        for start, stop in self._steps(rows):
            with read(start, stop) as values:
                try:
                    self._quantize(values, start, stop)
                except _UnknownError as unknown:
                    check_finite(unknown.amax, self.name, values)
                    found.append(unknown.amax)
        self.found = torch.cat(found)

    def quantize_steps(self, read: ReadRows, rows: int) -> Iterator[QuantizedRows]:
        """The shard, quantized, once that is complete; arguments and errors as for `find_next`."""
        for start, stop in self._steps(rows):
            with read(start, stop) as values:
                yield QuantizedRows(start, stop, self._quantize(values, start, stop))

    def _steps(self, rows: int) -> Iterator[tuple[int, int]]:
        step = self.n if spans_rows(self.scheme.weight) else rows
        return ((start, min(start + step, self.n)) for start in range(0, self.n, step))

    def _quantize(self, values: Tensor, start: int, stop: int) -> dict[str, Tensor]:
        if self.nonfinite == "zero":
            values = torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        return quantize_weight(values, self.scheme, self.name, reduce=self._reduce(start, stop))

    def _reduce(self, start: int, stop: int) -> Reduce:
        agreed = iter(self._agreed)

        def reduce(amax: Tensor, rows: int, cols: int) -> Tensor:
            if (cols if self.dim else rows) != 0:
                return amax  # of blocks that lie in this shard
            known = next(agreed, None)
            if known is None:
                raise _UnknownError(amax)
            return known[start // rows : -(-stop // rows)] if rows else known

        return reduce


class _UnknownError(Exception):
    """Scales need magnitudes that the ranks have not agreed on yet; these are the shard's own."""

    def __init__(self, amax: Tensor) -> None:
        super().__init__(amax)
        self.amax = amax


@lru_cache(maxsize=256)
def _count(scheme: Scheme, dim: int) -> int:
    """How often the scales of a scheme ask for maxima over shards."""
    asked = []

    def reduce(amax: Tensor, rows: int, cols: int) -> Tensor:
        if (cols if dim else rows) == 0:
            asked.append(amax)
        return amax

    block = torch.ones(alignment(scheme, 0), alignment(scheme, 1), dtype=torch.float32, device="cpu")
    quantize_weight(block, scheme, reduce=reduce)
    return len(asked)
