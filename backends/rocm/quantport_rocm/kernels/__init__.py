"""Kernels of the ROCm room."""

from __future__ import annotations

from quantport.backend import Kernel, aten
from quantport_rocm.kernels.matmul import RocmIntMM, RocmScaledMM


def kernels() -> tuple[Kernel, ...]:
    """Every kernel of the room."""
    return (RocmScaledMM(), RocmIntMM(), *aten.portable())
