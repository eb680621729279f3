"""Kernels of the CUDA room, and the order in which they are preferred."""

from __future__ import annotations

from collections.abc import Callable

from quantport.backend import Kernel, aten
from quantport_cuda.kernels.block_scaled import CudaScaledMX, CudaScaledNV
from quantport_cuda.kernels.int4 import CudaInt4Pack
from quantport_cuda.kernels.int8 import CudaIntMM, CudaTritonInt4Int8, CudaTritonInt8
from quantport_cuda.kernels.scaled import CudaScaledBlocks, CudaScaledMM
from quantport_cuda.measured import measured
from quantport_triton.kernels.block_scaled import TritonMx, TritonNvfp4
from quantport_triton.kernels.scaled import TritonFp8, TritonFp8Block
from quantport_triton.kernels.weight_only import TritonWeightOnly


def _triton(kernel: type[Kernel]) -> Callable[[], Kernel]:
    """A Triton kernel with the name of this room."""
    make: Callable[[str], Kernel] = measured(kernel)
    return lambda: make("cuda")


# Among kernels that run a request equally natively, the fastest measured one wins, or the first one here
# where nothing is measured. Each kernel says itself which architectures, shapes and builds it takes; the
# comments say only why it comes before the next one.
ORDER: tuple[Callable[[], Kernel], ...] = (
    measured(CudaScaledMM),  # fp8 by row: cuBLASLt or CUTLASS, which NVIDIA tunes for each architecture
    measured(CudaScaledBlocks),  # fp8 in blocks: cuBLASLt takes sm_90 alone
    measured(CudaScaledMX),  # mxfp8, and mxfp4 in some builds: cuBLASLt, as above
    measured(CudaScaledNV),
    # fp8 by row in fp16, for sizes that are not multiples of 16, and in builds without code for the GPU
    _triton(TritonFp8),
    _triton(TritonFp8Block),  # fp8 in blocks everywhere else
    _triton(TritonMx),  # mxfp4, and mxfp4 weights with mxfp8 activations, which cuBLASLt does not multiply
    _triton(TritonNvfp4),
    _triton(CudaTritonInt8),  # int8: scales in the same launch
    _triton(CudaTritonInt4Int8),
    # int8 where Triton does not compile: a few rows are padded, and the scales are passes of their own
    measured(CudaIntMM),
    # 16-bit activations, in both types and with any number of rows, from the stored layout
    _triton(TritonWeightOnly),
    # one launch, which decodes the weight once for every 16 rows
    measured(CudaInt4Pack),
)


def kernels() -> tuple[Kernel, ...]:
    """Every kernel of the room, the preferred first; the portable ones run everything else."""
    return (*(make() for make in ORDER), *aten.portable())
