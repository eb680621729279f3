"""The seam for checkpoint formats: who recognizes a directory, and what each stored weight is."""

from __future__ import annotations

from abc import ABC


class CheckpointFormat(ABC):
    """A way to store models.

    Attributes:
        name: Unique among the formats.
    """

    name: str
