"""The unit of work of compiled kernels that multiply, and its activations; importing it imports no numba."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from quantport.backend import BackendError, Quant
from quantport_cpu.jit.memory import Array, integers

PER_TOKEN = Quant("int8", (1, 0))  # int8 activations


class Job(NamedTuple):
    """Rows of the activations, the weight that they are multiplied by, and where the products go: a line of
    the table that a kernel reads.

    Attributes:
        start: The first row.
        stop: The row after the last one.
        weight: Index of the weight.
        column: The first column of the products in the result.
    """

    start: int
    stop: int
    weight: int
    column: int


JOB_BYTES = 8 * len(Job._fields)


@lru_cache(1024)
def all_rows(rows: int) -> Sequence[Job]:
    """All rows of the activations, multiplied by one weight."""
    return (Job(0, rows, 0, 0),)


def table(jobs: Sequence[Job], rows: int, weights: int, columns: int, width: int) -> Array:
    """The table of jobs.

    Args:
        jobs: The jobs.
        rows: Rows of the activations.
        weights: How many weights there are.
        columns: Columns of the products of one weight.
        width: Columns of the result.

    Raises:
        BackendError: a job reads rows or a weight that are not there, or writes past the result.
    """
    if len(jobs) == 1 and jobs[0] == (0, rows, 0, 0) and columns == width and weights:
        return _table_of_all(rows)
    last = width - columns
    for start, stop, weight, column in jobs:
        if not (0 <= start < stop <= rows and 0 <= weight < weights and 0 <= column <= last):
            raise BackendError(
                "multiply rows by a weight of several",
                f"rows {start} to {stop} of {rows}, weight {weight} of {weights}, products of {columns} "
                f"columns at {column} of {width}",
                "rows, a weight and columns that are there",
            )
    return integers(chain.from_iterable(jobs))


@lru_cache(1024)
def _table_of_all(rows: int) -> Array:
    return integers(all_rows(rows)[0])
