"""ATen's matrix multiplications with the limits that torch has on Intel GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantport.backend import Claim, Evidence, Request, aten

_YAML = "PyTorch native_functions.yaml"
_SCALED = "PyTorch aten/src/ATen/native/mkldnn/xpu/ScaledBlas.cpp at 00d8108f3608"
_INT = "PyTorch aten/src/ATen/native/mkldnn/xpu/Blas.cpp at 00d8108f3608, _int_mm_xpu"


def torch_reason(kernel: str, since: str) -> tuple[str, ...]:
    """The reason against an operator that torch has for XPU only since a version, or nothing."""
    if torch.__version__ >= since:  # TorchVersion compares as a version, not as text
        return ()
    return (f"{kernel} needs torch {since} or later on XPU, not {torch.__version__} [{_YAML}]",)


class XpuScaledMM(aten.ScaledMM):
    """``torch._scaled_mm`` with row scales, through oneDNN."""

    name = "xpu._scaled_mm"

    def reasons_against(self, request: Request) -> Sequence[str]:
        """Adds: where XMX has no fp8, the operator runs but converts both operands first, so it only loses time."""
        reasons = [*super().reasons_against(request), *torch_reason(self.name, "2.10")]
        arch = request.device.arch
        if "e4m3fn" not in arch.native:
            reasons.append(f"on {arch.name}, {self.name} converts e4m3fn to a wider type before it multiplies [{arch.source}]")
        return reasons

    def claim(self, request: Request) -> Claim:
        """PyTorch's own kernel, and the instruction."""
        return Claim(Evidence.DECLARED, f"{_SCALED}; {request.device.arch.source}")


class XpuIntMM(aten.IntMM):
    """``torch._int_mm`` through oneDNN."""

    name = "xpu._int_mm"

    def reasons_against(self, request: Request) -> Sequence[str]:
        """Adds: the operator exists for XPU since torch 2.9."""
        return [*super().reasons_against(request), *torch_reason(self.name, "2.9")]

    def claim(self, request: Request) -> Claim:
        """PyTorch's own kernel, and the instruction."""
        return Claim(Evidence.DECLARED, f"{_INT}; {request.device.arch.source}")
