"""Kernels of the CPU room."""

from __future__ import annotations

from quantport.backend import Kernel, aten


def kernels() -> tuple[Kernel, ...]:
    """Every kernel of the room."""
    return aten.portable()
