"""W8A8 through ATen: int8 on the matrix engines, and fp8, which they multiply from Xe3p on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantport.backend import (
    Claim,
    CodedRows,
    Evidence,
    Packed,
    Reason,
    ReasonCode,
    Refusal,
    Request,
    Status,
    WeightSpec,
    aten,
)
from quantport_xpu.kernels.operators import operator_reason

_SCALED = "PyTorch aten/src/ATen/native/mkldnn/xpu/ScaledBlas.cpp at 00d8108f3608, _scaled_mm_out_xpu"
_INT = "PyTorch aten/src/ATen/native/mkldnn/xpu/Blas.cpp at 003d1b101f9e, _int_mm_out_xpu"


def converts(request: Request) -> str:
    """What oneDNN does with fp8 where the matrix engines lack it; '' where they have it."""
    arch = request.device.arch
    if "e4m3fn" in arch.native:
        return ""
    return f"on {arch.name}, oneDNN converts e4m3fn to a wider type before it multiplies [{arch.source}]"


class XpuScaledMM(aten.ScaledMM):
    """``torch._scaled_mm`` with row scales, through oneDNN, where XMX multiplies e4m3fn."""

    name = "xpu._scaled_mm"

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        """Adds the operator, and that before Xe3p it converts both operands first, which only costs time."""
        gate = operator_reason(request, self.name, "_scaled_mm", "2.10")
        slower = [Reason(why, Refusal.SLOWER)] if (why := converts(request)) else []
        return [*super().reasons_against(request), *gate, *slower]

    def claim(self, request: Request) -> Claim:
        """PyTorch's own kernel, and the instruction."""
        return Claim(Evidence.DECLARED, f"{_SCALED}; {request.device.arch.source}")

    def run_codes(self, x: CodedRows, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        if not len(x.codes):  # torch takes no strides of the scales of zero rows
            return x.codes.new_empty(0, spec.n, dtype=x.dtype)
        return super().run_codes(x, packed, bias, spec)


class XpuFp8Emulated(XpuScaledMM):
    """The same operator where XMX has no fp8: the values of W8A8, multiplied in 16 bits.

    There fp8 is a storage format, and weight-only kernels do less work and round less. So the status is
    ``reference``: this kernel is chosen where the exact emulation is requested, before that of torch.
    """

    name = "xpu._scaled_mm_emulated"
    status = Status.REFERENCE

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        """Those of the base class but for the matrix instruction; and a reason where there is one."""
        arch = request.device.arch
        others = [
            r
            for r in super().reasons_against(request)
            if r.code is not ReasonCode.NO_MATRIX_INSTRUCTION and r.kind is not Refusal.SLOWER
        ]
        if "e4m3fn" not in arch.native:
            return others
        text = f"{arch.name} multiplies e4m3fn natively: {XpuScaledMM.name} does"
        return [Reason(text, Refusal.NOT_OFFERED), *others]

    def slow(self, request: Request) -> str:
        return f"{converts(request)}, and activations are quantized first"


class XpuIntMM(aten.IntMM):
    """``torch._int_mm`` through oneDNN, for any sizes. The scales are applied afterwards, in passes of their
    own.
    """

    name = "xpu._int_mm"

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        """The matrix instruction, and the operator."""
        return [*aten.native_reason(request, "int8"), *operator_reason(request, self.name, "_int_mm", "2.9")]

    def claim(self, request: Request) -> Claim:
        """PyTorch's own kernel, and the instruction."""
        return Claim(Evidence.DECLARED, f"{_INT}; {request.device.arch.source}")

    def run_codes(self, x: CodedRows, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        (weight, row), codes = packed, x.codes
        if spec.k == 1:  # oneDNN misreads the strides of such matrices
            codes, weight = (torch.nn.functional.pad(t, (0, 1)) for t in (codes, weight))
        y = torch._int_mm(codes, weight.t()) * x.scale * row.view(1, -1)
        return (y if bias is None else y + bias).to(x.dtype)
