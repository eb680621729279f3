"""Kernels of the NPU room, the preferred first; the portable ones run everything else."""

from __future__ import annotations

from quantport.backend import Kernel, aten
from quantport_npu.kernels.integer import NpuInt8, NpuWeightInt4, NpuWeightInt8


def kernels() -> tuple[Kernel, ...]:
    """Every kernel of the room."""
    return (NpuInt8(), NpuWeightInt8(), NpuWeightInt4(), *aten.portable())
