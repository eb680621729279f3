"""Kernels of the CUDA room."""

from __future__ import annotations

from quantport.backend import Kernel, aten
from quantport_cuda.kernels.matmul import CudaIntMM, CudaScaledMM
from quantport_triton.kernels.weight_only import TritonWeightOnly


def kernels() -> tuple[Kernel, ...]:
    """Every kernel of the room."""
    return (CudaScaledMM(), CudaIntMM(), TritonWeightOnly("cuda"), *aten.portable())
