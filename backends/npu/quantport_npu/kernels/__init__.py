"""Kernels of the NPU room: the portable ones. Ascend's own operators are not in this version."""

from __future__ import annotations

from quantport.backend import Kernel, aten


def kernels() -> tuple[Kernel, ...]:
    """Every kernel of the room."""
    return aten.portable()
