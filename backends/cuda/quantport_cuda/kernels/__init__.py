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
    """A Triton kernel under the name that it has in this room."""
    made: Callable[[str], Kernel] = measured(kernel)
    return lambda: made("cuda")


# Among kernels that run a request equally natively, the fastest one measured wins, and where nothing is
# measured the first here.
# Which architectures, shapes and builds a kernel takes is its own to say: each line only says why it stands
# before the next.
ORDER: tuple[Callable[[], Kernel], ...] = (
    measured(CudaScaledMM),  # fp8 by row: cuBLASLt or CUTLASS, which NVIDIA tunes for each architecture
    measured(CudaScaledBlocks),  # fp8 in blocks: cuBLASLt takes sm_90 alone
    measured(CudaScaledMX),  # mxfp8, and mxfp4 in some builds: cuBLASLt, as above
    measured(CudaScaledNV),
    # fp8 by row in fp16, in sizes that are no multiples of 16, and in builds that have no code for the GPU
    _triton(TritonFp8),
    _triton(TritonFp8Block),  # fp8 in blocks everywhere else
    _triton(TritonMx),  # mxfp4, and mxfp4 weights with mxfp8 activations, which cuBLASLt does not multiply
    _triton(TritonNvfp4),
    _triton(CudaTritonInt8),  # int8: scales in the same launch
    _triton(CudaTritonInt4Int8),
    # padded up to 32 rows, and the scales in passes of their own; for what Triton does not compile
    measured(CudaIntMM),
    # 16-bit activations: reads the stored layout, with every number of rows and both 16-bit types
    _triton(TritonWeightOnly),
    # one launch for all numbers of rows: decodes the weight once for every 16 of them
    measured(CudaInt4Pack),
)


def kernels() -> tuple[Kernel, ...]:
    """Every kernel of the room, the preferred first; the portable ones run everything else."""
    return (*(make() for make in ORDER), *aten.portable())
