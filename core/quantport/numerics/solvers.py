"""The seam for solvers: how the codes and scales of a weight are found."""

from __future__ import annotations

from abc import ABC


class Solver(ABC):
    """Finds codes and scales.

    Attributes:
        name: Unique among the solvers; an option of schemes after a colon.
    """

    name: str
