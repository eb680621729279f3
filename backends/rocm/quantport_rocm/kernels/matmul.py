"""ATen's matrix multiplications, with the limits of torch on AMD GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from quantport.backend import Claim, Evidence, Reason, Request, aten

_BLAS = "PyTorch aten/src/ATen/native/cuda/ScaledBlas.cpp at 0174dfabc023"
_INT = (
    "PyTorch aten/src/ATen/native/cuda/Blas.cpp, _int_mm_out_cuda (more than 16 rows, K and N multiples of 8)"
)


class RocmScaledMM(aten.ScaledMM):
    """``torch._scaled_mm`` with row scales, through hipBLASLt."""

    name = "rocm._scaled_mm"

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        """Adds that e4m3fnuz is another format, and that e4m3fn needs ROCm 6.5."""
        device = request.device
        reasons = list(super().reasons_against(request))
        if "e4m3fnuz" in device.arch.native:
            lacks = "the conversion of the weights is not in this version"
            reasons.append(Reason(f"{device.arch.name} multiplies e4m3fnuz, not e4m3fn, and {lacks}"))
        elif "e4m3fn" in device.arch.native and not device.simulated and "rocm>=6.5" not in device.features:
            reasons.append(
                Reason(f"{self.name} takes e4m3fn only in a torch built for ROCm 6.5 or later [{_BLAS}]")
            )
        return reasons

    def claim(self, request: Request) -> Claim:
        """PyTorch's own gate, and the instruction."""
        gate = "e4m3fn with row scales and bf16 output on gfx950 and gfx12 from ROCm 6.5"
        return Claim(Evidence.DECLARED, f"{_BLAS} ({gate}); {request.device.arch.source}")


class RocmIntMM(aten.IntMM):
    """``torch._int_mm`` through hipBLASLt; up to 16 rows are padded."""

    name = "rocm._int_mm"

    def claim(self, request: Request) -> Claim:
        """PyTorch's own limits, and the instruction."""
        return Claim(Evidence.DECLARED, f"{_INT}; {request.device.arch.source}")
