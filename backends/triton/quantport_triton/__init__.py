"""Triton kernels for the rooms of GPUs. It knows no device: a room takes ``quantport_triton.kernels`` and
says where they run.

Importing this package imports no Triton; ``available`` says whether one is here, and ``version`` which.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from importlib.util import find_spec

OLDEST = (3, 4)
FIRST = {
    "sm_103": (3, 6)
}  # the first that compiles anything for an architecture, where that is not the oldest


@cache
def available() -> str:
    """Why Triton kernels cannot run or be compiled in this environment: '' when they can."""
    if find_spec("triton") is None:
        return "the package triton is not installed: pip install triton"
    if version() < OLDEST:
        return "Triton {}.{} is too old: pip install 'triton>={}.{}'".format(*version(), *OLDEST)
    return ""


@cache
def version() -> tuple[int, int]:
    """The Triton that is installed, under whichever name its packages go; one without metadata counts as the
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
    """Whether a Triton is installed that compiles for an architecture at all."""
    return not available() and version() >= FIRST.get(target, OLDEST)
