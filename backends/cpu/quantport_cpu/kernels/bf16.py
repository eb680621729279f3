"""BF16 layers that stay BF16, with the weight reordered once for oneDNN: the honest baseline of every other
kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantport.backend import Packed, Reason, Refusal, Request, Scheme, StoredWeight, WeightSpec
from quantport_cpu.kernels.base import CpuKernel


class CpuBf16(CpuKernel):
    """``F.linear`` over a prepacked weight."""

    name = "cpu.bf16"
    tolerance = 2.0**-6

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
