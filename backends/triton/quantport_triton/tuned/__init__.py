"""Configurations of kernels, as data: ``default.json``, and a file for each architecture where something else
is better.

A file maps a family of kernels to its ways, in the order of rows of activations: the first whose ``rows`` is
not below them is taken. ``null`` is any number. The other keys are block sizes, and what ``Config`` has.
``{"like": "sm_120"}`` is all that a file says of an architecture that has nothing of its own.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from quantport_triton.launch import Config

_OWN = ("rows", "way", "warps", "stages")


@cache
def _read(name: str) -> dict[str, Any]:
    path = files("quantport_triton.tuned") / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@cache
def ways(target: str, family: str) -> tuple[dict[str, Any], ...]:
    """The ways of a family of kernels on an architecture, with those of a narrower file first."""
    table = _read(target)
    if "like" in table:
        return ways(table["like"], family)
    return tuple(table.get(family) or _read("default")[family])


@cache
def way(target: str, family: str, rows: int) -> tuple[str, Config]:
    """Name and configuration of the way for so many rows of activations."""
    found = next(w for w in ways(target, family) if w["rows"] is None or rows <= w["rows"])
    blocks = {key: value for key, value in found.items() if key not in _OWN}
    return found["way"], Config(blocks, found.get("warps", 4), found.get("stages", 3))
