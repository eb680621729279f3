"""W8A8 INT8 through ``torch._int_mm``."""

from __future__ import annotations

from torch import Tensor

from quantport.backend import Claim, Evidence, Quant, Request, aten
from quantport_cuda.kernels.activations import quantized

_INT = "PyTorch aten/src/ATen/native/cuda/Blas.cpp, _int_mm_out_cuda (more than 16 rows, K and N multiples of 8)"
SLOW = (
    "sm_103 multiplies int8 through mma.sync only: 165 TOPS on GB300, where B200 has 4500 "
    "[torch 2.15.0 torch/_inductor/analysis/device_info.py]"
)


class CudaIntMM(aten.IntMM):
    """``torch._int_mm`` through cuBLASLt; up to 16 rows are padded. Scales are multiplied afterwards, in passes of their own."""

    name = "cuda._int_mm"

    def claim(self, request: Request) -> Claim:
        """PyTorch's own limits, and the instruction."""
        return Claim(Evidence.DECLARED, f"{_INT}; {request.device.arch.source}")

    def slow(self, request: Request) -> str:
        """On sm_103, why int8 is slower than bf16 there."""
        return SLOW if request.device.arch.name == "sm_103" else ""

    def quantize(self, x: Tensor, quant: Quant) -> tuple[Tensor, Tensor]:
        q = quantized(x, quant)
        return q.codes, q.scale
