"""Triton kernels for the rooms of GPUs. It knows no device: a room takes ``quantport_triton.kernels`` and says where they run.

Importing this package imports no Triton; ``available`` says whether one is here.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec


@cache
def available() -> str:
    """Why Triton kernels cannot run or be compiled in this environment: '' when they can."""
    if find_spec("triton") is None:
        return "the package triton is not installed: pip install triton"
    return ""
