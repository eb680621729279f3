"""Kernels of the NPU room, the preferred first; the portable ones run everything else."""

from __future__ import annotations

from quantport.backend import Kernel, aten
from quantport_npu.kernels import grouped
from quantport_npu.kernels.floating import NpuFp8, NpuFp8Block
from quantport_npu.kernels.integer import (
    NpuInt8,
    NpuWeightFp8,
    NpuWeightInt4,
    NpuWeightInt4Offset,
    NpuWeightInt8,
)
from quantport_npu.kernels.mx import VARIANTS, NpuDualScale, NpuMx


def kernels() -> tuple[Kernel, ...]:
    """Every kernel of the room."""
    quantized = (NpuInt8(), NpuFp8(), NpuFp8Block(), *(NpuMx(name) for name in VARIANTS), NpuDualScale())
    weight_only = (NpuWeightInt8(), NpuWeightFp8(), NpuWeightInt4(), NpuWeightInt4Offset())
    return (*grouped.kernels(), *quantized, *weight_only, *aten.portable())
