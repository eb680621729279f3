"""The unit of work of ``grouped_small_batch``, and its activations; importing it imports no numba."""

from __future__ import annotations

from typing import NamedTuple

from quantport.backend import Quant

PER_TOKEN = Quant("int8", (1, 0))  # int8 activations


class Job(NamedTuple):
    """Rows of the activations, the weight that they are multiplied by, and where the products go.

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
