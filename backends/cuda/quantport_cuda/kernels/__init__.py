"""Kernels of the CUDA room, and the order in which they are preferred."""

from __future__ import annotations

from collections.abc import Callable

from quantport.backend import Kernel, aten
<<<<<<< HEAD
from quantport_cuda.kernels.block_scaled import CudaScaledMX, CudaScaledNV
from quantport_cuda.kernels.int4 import CudaInt4Pack
from quantport_cuda.kernels.int8 import CudaIntMM
from quantport_cuda.kernels.scaled import CudaScaledBlocks, CudaScaledMM
from quantport_cuda.measured import measured
from quantport_triton.kernels.weight_only import TritonWeightOnly


def _triton(kernel: type[Kernel]) -> Callable[[], Kernel]:
    """A Triton kernel under the name that it has in this room."""
    made: Callable[[str], Kernel] = measured(kernel)
    return lambda: made("cuda")


# Among kernels that run a request equally natively, the fastest one measured wins, and where nothing is measured the first here.
# Which architectures, shapes and builds a kernel takes is its own to say: each line only says why it stands before the next.
ORDER: tuple[Callable[[], Kernel], ...] = (
    measured(CudaScaledMM),  # fp8 by row: cuBLASLt or CUTLASS, which NVIDIA tunes for each architecture
    measured(CudaScaledBlocks),  # fp8 in blocks: cuBLASLt takes sm_90 alone
    measured(CudaScaledMX),  # mxfp8, and mxfp4 in some builds: cuBLASLt, as above
    measured(CudaScaledNV),
    # <- Triton kernels that quantize activations stand here: _triton(TritonFp8), _triton(TritonInt8), ...
    measured(CudaIntMM),  # int8: padded up to 32 rows, and the scales in passes of their own; for what Triton does not compile
    _triton(TritonWeightOnly),  # 16-bit activations: reads the stored layout, with every number of rows and both 16-bit types
    measured(CudaInt4Pack),  # one launch for all numbers of rows: decodes the weight once for every 16 of them
)


def kernels() -> tuple[Kernel, ...]:
    """Every kernel of the room, the preferred first; the portable ones run everything else."""
    return (*(make() for make in ORDER), *aten.portable())
=======
from quantport_cuda.kernels.matmul import CudaIntMM, CudaScaledMM
from quantport_triton.kernels.weight_only import TritonWeightOnly


def kernels() -> tuple[Kernel, ...]:
    """Every kernel of the room."""
    return (CudaScaledMM(), CudaIntMM(), TritonWeightOnly("cuda"), *aten.portable())
>>>>>>> main
