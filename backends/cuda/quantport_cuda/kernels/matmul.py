"""ATen's matrix multiplications with the limits that torch has on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from quantport.backend import Claim, Evidence, Request, aten

_SCALED = (
    "PyTorch aten/src/ATen/native/cuda/ScaledBlas.cpp at 0174dfabc023 (compute capability 8.9, or 9.0 and later) and "
    "RowwiseScaledMM.cu at 01386a0dab6f (row-wise scales on 8.9, 9.x, 10.x, 11.x, 12.x)"
)
_INT = "PyTorch aten/src/ATen/native/cuda/Blas.cpp, _int_mm_out_cuda (more than 16 rows, K and N multiples of 8)"
_NEW = ("sm_103", "sm_121")
_SLOW = (
    "sm_103 multiplies int8 through mma.sync only: 165 TOPS on GB300, where B200 has 4500 "
    "[torch 2.15.0 torch/_inductor/analysis/device_info.py]"
)


class CudaScaledMM(aten.ScaledMM):
    """``torch._scaled_mm`` with row scales: cuBLASLt on sm_90 from CUDA 12.9 on, else CUTLASS."""

    name = "cuda._scaled_mm"

    def reasons_against(self, request: Request) -> Sequence[str]:
        """Adds: the row-wise kernel holds code for sm_103 and sm_121 only in builds for CUDA 12.9 and later."""
        device = request.device
        reasons = list(super().reasons_against(request))
        if device.arch.name in _NEW and not device.simulated and "cuda>=12.9" not in device.features:
            name = device.arch.name
            reasons.append(f"{self.name} needs a torch built for CUDA 12.9 or later on {name} [PyTorch cmake/Codegen.cmake]")
        return reasons

    def claim(self, request: Request) -> Claim:
        """PyTorch's own gate, and the instruction."""
        return Claim(Evidence.DECLARED, f"{_SCALED}; {request.device.arch.source}")


class CudaIntMM(aten.IntMM):
    """``torch._int_mm`` through cuBLASLt; up to 16 rows are padded."""

    name = "cuda._int_mm"

    def claim(self, request: Request) -> Claim:
        """PyTorch's own limits, and the instruction."""
        return Claim(Evidence.DECLARED, f"{_INT}; {request.device.arch.source}")

    def slow(self, request: Request) -> str:
        """On sm_103, why int8 is slower than bf16 there."""
        return _SLOW if request.device.arch.name == "sm_103" else ""
