"""BF16 layers that stay BF16: with the weight reordered once for oneDNN, the honest baseline of every other
kernel; or multiplied as fp32 where the processor has no arithmetic for bf16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantport.backend import Packed, Reason, Refusal, Request, Scheme, StoredWeight, WeightSpec
from quantport_cpu.kernels.base import CpuKernel, CpuStacked, multiply_by_panels, why_unavailable_on

_SMALL_BATCH = 64  # up to this many rows, converting in registers beats converting panels


class CpuBf16(CpuKernel):
    """``F.linear`` over a prepacked weight."""

    name = "cpu.bf16"
    tolerance = 2.0**-6
    made_of = "torch's CPU operators"

    def serves(self, scheme: Scheme) -> bool:
        return scheme.weight.format == "bf16"

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reasons = []
        if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkldnn.is_available():
            reasons.append(Reason("this torch has no mkldnn._linear_pointwise"))
        elif not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            reasons.append(Reason("oneDNN has no bf16 matmul on this processor"))
        if request.dtype is not torch.bfloat16:
            text = (
                f"it takes bfloat16 activations; of {request.dtype} it makes a copy of the weight each time"
            )
            reasons.append(Reason(text, Refusal.SLOWER))
        return reasons

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        return (torch.ops.mkldnn._reorder_linear_weight(stored_weight["weight"], 16),)

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        return {"weight": packed[0].to_dense()}

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        if x.dtype is not torch.bfloat16:  # as autocast may have it: oneDNN takes none beside bf16 weights
            return torch.nn.functional.linear(x, packed[0].to_dense().to(x.dtype), bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed[0], bias, "none", [], "")
        return y


class CpuBf16AsFp32(CpuStacked):
    """BF16 weights as they are stored, multiplied as FP32: few rows in registers, many by panels."""

    name = "cpu.bf16_as_fp32"
    tolerance = 2.0**-6
    made_of = "compiled on the machine by numba"

    def serves(self, scheme: Scheme) -> bool:
        return scheme.weight.format == "bf16"

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reason = why_unavailable_on(request.device)
        if not reason and "bf16" in request.device.arch.native:
            return [Reason("this processor multiplies bf16 itself", Refusal.SLOWER)]
        return [Reason(reason)] if reason else []

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        from quantport_cpu.jit import gemv_bf16

        (weight,) = packed
        if not x.shape[0]:
            y = x.new_zeros(0, spec.n, dtype=torch.float32)
        elif x.shape[0] <= _SMALL_BATCH:
            y = gemv_bf16.multiply(x, weight)
        else:
            y = multiply_by_panels(
                x.float(), spec.n, spec.k, lambda r, panel: panel.copy_(weight[r : r + len(panel)])
            )
        return (y if bias is None else y.add_(bias)).to(x.dtype)
