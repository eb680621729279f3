"""Weights of 4 and 8 bits with 16-bit activations, through ATen's operators for Intel GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantport.backend import (
    Claim,
    Evidence,
    Kernel,
    Packed,
    PackedLayout,
    PackedTensor,
    Quant,
    Reason,
    Request,
    Scheme,
    StoredWeight,
    WeightSpec,
)
from quantport_xpu.kernels.operators import operator_reason

_BLAS = "PyTorch aten/src/ATen/native/mkldnn/xpu/Blas.cpp at 003d1b101f9e"
_INT4 = (
    f"{_BLAS}, _weight_int4pack_mm_xpu; intel/torch-xpu-ops WeightInt4PackKernel.cpp at 0c36dc09257c "
    "(the low nibble first)"
)
_INT8 = f"{_BLAS}, _weight_int8pack_mm_xpu; QMatmul.cpp at 0020853888ad (scales are read in fp32)"
ZERO = 8  # codes are stored as code + 8


class XpuInt8Pack(Kernel):
    """W8A16 through ``torch.ops.aten._weight_int8pack_mm``: int8 with a scale in fp32 for each output
    channel.
    """

    name = "xpu._weight_int8pack_mm"
    tolerance = 2.0**-7

    def serves(self, scheme: Scheme) -> bool:
        return scheme.weight == Quant("int8", (1, 0))

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        return operator_reason(request, self.name, "_weight_int8pack_mm", "2.10")

    def claim(self, request: Request) -> Claim:
        """PyTorch's source."""
        return Claim(Evidence.DECLARED, _INT8)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        if not len(x):  # oneDNN multiplies no empty matrices
            return x.new_empty(0, spec.n)
        weight, scale = packed
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x, weight, scale.view(-1))
        return y if bias is None else y.add_(bias)


class Int4Groups(Kernel):
    """The base class of kernels for oneDNN's u4 weights.

    The stored words are in oneDNN's layout: eight codes along K in an int32, the first in the lowest nibble.
    Only scales are packed, a row for each group. Offsets in bf16 are not served, since oneDNN subtracts whole
    codes.
    """

    tolerance = 2.0**-7

    def serves(self, scheme: Scheme) -> bool:
        quant = scheme.weight
        kind = (quant.format, quant.block_shape[0], quant.scale, quant.zero_point, quant.outer_block)
        return kind == ("int4", 1, "bf16", False, None)

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        spec = request.weight
        group = spec.scheme.weight.group_size
        reasons = []
        if not group or group % 32:
            reasons.append(
                Reason(f"{self.name} takes groups that are multiples of 32, not of {group or 'all of K'}")
            )
        elif spec.k % group:
            reasons.append(
                Reason(f"{self.name} needs K to be a multiple of the group of {group}, not {spec.k}")
            )
        return reasons

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        scale = stored_weight["weight_scale"].t().contiguous()
        return stored_weight["weight_packed"], scale, self.zeros(scale)

    def packed_layout(self, spec: WeightSpec) -> PackedLayout | None:
        words, scale = self.stored_layout(spec)
        turned = PackedTensor(scale.shape[::-1], scale.dtype, rows=1)
        return PackedLayout((words, turned, turned._replace(dtype=torch.int8)))

    def zeros(self, scale: Tensor) -> Tensor:
        """The code of zero for each group: int8 ``[K / group, N]``."""
        return torch.full_like(scale, ZERO, dtype=torch.int8)

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        return {"weight_packed": packed[0], "weight_scale": packed[1].t().contiguous()}


class XpuInt4Pack(Int4Groups):
    """W4A16 through ``torch.ops.aten._weight_int4pack_mm_with_scales_and_zeros``: int4 in groups without
    offsets.
    """

    name = "xpu._weight_int4pack_mm"

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reasons = list(super().reasons_against(request))
        if request.dtype is not torch.bfloat16:  # the scales, in bf16, would be rounded
            reasons.append(
                Reason(
                    f"{self.name} takes activations in the dtype of the scales, bfloat16, not {request.dtype}"
                )
            )
        return [
            *reasons,
            *operator_reason(request, self.name, "_weight_int4pack_mm_with_scales_and_zeros", "2.8"),
        ]

    def claim(self, request: Request) -> Claim:
        """PyTorch's source."""
        return Claim(Evidence.DECLARED, _INT4)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        if not len(x):
            return x.new_empty(0, spec.n)
        operator = torch.ops.aten._weight_int4pack_mm_with_scales_and_zeros
        y: Tensor = operator(x, packed[0], spec.scheme.weight.group_size, packed[1], packed[2])
        return y if bias is None else y.add_(bias)
