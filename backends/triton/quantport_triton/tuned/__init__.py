"""Configurations of the kernels: ``default.json``, and a file for each architecture where others are better.

A file maps a family of kernels to entries in ascending order of ``max_rows``. The first entry that covers the
rows of the activations, or of the matrix to quantize, is used; ``null`` covers any number. ``kernel`` names
the kernel of the family where it has several, ``warps`` and ``stages`` are those of ``Config``, and all other
keys are block sizes. ``{"like": "sm_120"}`` stands for an architecture with the configurations of another.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from quantport_triton.launch import Config

_NOT_BLOCKS = ("max_rows", "kernel", "warps", "stages")


@cache
def _read(name: str) -> dict[str, Any]:
    path = files("quantport_triton.tuned") / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@cache
def entries(target: str, family: str) -> tuple[dict[str, Any], ...]:
    """All entries of a family for an architecture: those of its own file, else the default."""
    table = _read(target)
    if "like" in table:
        return entries(table["like"], family)
    return tuple(table.get(family) or _read("default")[family])


def _entry(target: str, family: str, rows: int) -> dict[str, Any]:
    return next(e for e in entries(target, family) if e["max_rows"] is None or rows <= e["max_rows"])


@cache
def tuned_kernel(target: str, family: str, rows: int) -> str:
    """Name of the kernel that a family with several uses for so many rows."""
    return str(_entry(target, family, rows)["kernel"])


@cache
def tuned_config(target: str, family: str, rows: int) -> Config:
    """Configuration of a family of kernels for so many rows."""
    entry = _entry(target, family, rows)
    blocks = {key: value for key, value in entry.items() if key not in _NOT_BLOCKS}
    return Config(blocks, entry.get("warps", 4), entry.get("stages", 3))
