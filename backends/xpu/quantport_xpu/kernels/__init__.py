"""Kernels of the XPU room."""

from __future__ import annotations

from quantport.backend import Kernel, aten
from quantport_xpu.kernels.matmul import XpuIntMM, XpuScaledMM


def kernels() -> tuple[Kernel, ...]:
    """Every kernel of the room."""
    return (XpuScaledMM(), XpuIntMM(), *aten.portable())
