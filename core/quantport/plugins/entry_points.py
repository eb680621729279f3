"""Where plugins are published. Costs no more than reading the metadata of what is installed."""

from __future__ import annotations

from functools import cache
from importlib.metadata import Distribution, EntryPoint, entry_points

BACKENDS, PLUGINS = GROUPS = ("quantport.backends", "quantport.plugins")


def installed() -> list[EntryPoint]:
    """Every installed entry point of a plugin."""
    found = entry_points()  # asked once: it reads the metadata of all that is installed
    return [point for group in GROUPS for point in found.select(group=group)]


def is_builtin(point: EntryPoint) -> bool:
    """Whether a plugin is part of the quantport distribution itself."""
    return point.dist is not None and _name(point.dist) == "quantport"


@cache
def _name(distribution: Distribution) -> str:
    """Its name, for which its metadata are parsed."""
    return distribution.name
