"""Triton kernels for the rooms of GPUs. They know no device: a room lists those of
``quantport_triton.kernels`` that run on its devices.

Importing this package does not import Triton; ``available`` says whether it is installed, and ``version``
which.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from importlib.util import find_spec

OLDEST = (3, 4)
# The first version that compiles anything for an architecture, where that is later than the oldest.
FIRST = {"sm_103": (3, 6)}


@cache
def available() -> str:
    """Why Triton kernels cannot be compiled or run in this environment; '' where they can."""
    if find_spec("triton") is None:
        return "the package triton is not installed: pip install triton"
    if version() < OLDEST:
        return "Triton {}.{} is too old: pip install 'triton>={}.{}'".format(*version(), *OLDEST)
    return ""


@cache
def version() -> tuple[int, int]:
    """The version of the installed Triton, whatever its package is called; one without metadata counts as the
    newest.
    """
    for name in (
        "triton",
        "pytorch-triton",
        "pytorch-triton-rocm",
        "triton-xpu",
        "pytorch-triton-xpu",
        "triton-windows",
    ):
        try:
            major, minor = metadata.version(name).split(".")[:2]
        except metadata.PackageNotFoundError:
            continue
        return int(major), int(minor)
    return 99, 0


@cache
def compiles_for(target: str) -> bool:
    """Whether the installed Triton compiles for an architecture at all."""
    return not available() and version() >= FIRST.get(target, OLDEST)
