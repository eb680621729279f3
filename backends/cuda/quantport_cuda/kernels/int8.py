"""INT8 products: ``torch._int_mm``, and Triton's kernels with what this room knows of them."""

from __future__ import annotations

from torch import Tensor

from quantport.backend import Claim, Evidence, Kernel, Quant, Request, aten
from quantport_triton.kernels.scaled import TritonInt4Int8, TritonInt8
from quantport_triton.quantize import quantize

_INT = (
    "PyTorch aten/src/ATen/native/cuda/Blas.cpp, _int_mm_out_cuda (more than 16 rows, K and N multiples of 8)"
)
_SLOW = (
    "sm_103 multiplies int8 through mma.sync only: 165 TOPS on GB300, where B200 has 4500 "
    "[torch 2.15.0 torch/_inductor/analysis/device_info.py]"
)


class _Int8(Kernel):
    """Multiplies int8 by int8."""

    def slow(self, request: Request) -> str:
        """Why int8 is slower than bf16 on sm_103."""
        return _SLOW if request.device.arch.name == "sm_103" else ""


class CudaIntMM(_Int8, aten.IntMM):
    """``torch._int_mm`` through cuBLASLt; up to 16 rows are padded. The scales are applied afterwards, in
    passes of their own.
    """

    name = "cuda._int_mm"

    def claim(self, request: Request) -> Claim:
        """PyTorch's own limits, and the instruction."""
        return Claim(Evidence.DECLARED, f"{_INT}; {request.device.arch.source}")

    def quantize(self, x: Tensor, quant: Quant) -> tuple[Tensor, Tensor]:
        q = quantize(x, quant)
        return q.codes, q.scale


class CudaTritonInt8(_Int8, TritonInt8):
    """W8A8 in one launch, after the one that quantizes the activations."""


class CudaTritonInt4Int8(_Int8, TritonInt4Int8):
    """W4A8: int4 codes become int8 in registers."""
