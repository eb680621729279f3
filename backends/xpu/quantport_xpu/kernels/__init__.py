"""Kernels of the XPU room, and the order in which they are preferred."""

from __future__ import annotations

from collections.abc import Callable

from quantport.backend import Kernel, aten
from quantport_xpu.kernels.mx import XpuMxfp4, XpuMxfp4Marlin, XpuMxfp4Quantized, XpuMxfp8
from quantport_xpu.kernels.scaled import XpuFp8Emulated, XpuIntMM, XpuScaledMM
from quantport_xpu.kernels.triton import XpuTritonInt4Int8, XpuTritonInt8, XpuTritonWeightOnly
from quantport_xpu.kernels.vendor import XpuFp8Gemm, XpuFp8W8A16, XpuInt4W4A8, XpuInt4W4A16
from quantport_xpu.kernels.weight_only import XpuInt4Pack, XpuInt8Pack

# Nothing is measured: among kernels that run a request equally natively, the first one here wins. Operators
# of torch come first, since PyTorch's tests run them on these GPUs; Triton's kernels were never compiled for
# them.
ORDER: tuple[Callable[[], Kernel], ...] = (
    XpuScaledMM,
    XpuFp8Gemm,  # fp8 in blocks, and in fp16
    XpuIntMM,
    lambda: XpuTritonInt8("xpu"),  # int8 where this torch has no operator for it
    XpuInt4W4A8,
    lambda: XpuTritonInt4Int8("xpu"),  # the same without vllm-xpu-kernels, as for simulated GPUs
    XpuInt8Pack,
    XpuInt4Pack,
    XpuInt4W4A16,  # the same oneDNN, in fp16 too
    XpuFp8W8A16,  # fp8 weights, for which torch has no operator
    XpuMxfp4Marlin,  # mxfp4 weights, for which only an archived package has an operator
    lambda: XpuTritonWeightOnly("xpu"),  # every other format and shape
    XpuFp8Emulated,  # from here on: only where the exact emulation is requested
    XpuMxfp8,
    XpuMxfp4Quantized,  # quantizes activations in one launch, by its rule for scales only
    XpuMxfp4,
)


def kernels() -> tuple[Kernel, ...]:
    """Every kernel of the room, the preferred first; the portable ones run everything else."""
    return (*(make() for make in ORDER), *aten.portable())
