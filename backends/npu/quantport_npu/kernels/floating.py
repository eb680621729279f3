"""FP8 by FP8 with fp32 scales on Ascend 950: per token and output channel, and in blocks of 128x128."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from quantport.backend import Packed, Quant, Scheme, WeightSpec
from quantport_npu.kernels.base import Calls, NpuKernel
from quantport_npu.vendor import NN

_E4M3 = torch.float8_e4m3fn
_V5 = "matmul/quant_batch_matmul_v4/docs/aclnnQuantMatmulV5.md"


class _Fp8(NpuKernel):
    """The weight as stored, transposed as a view. The bias is added afterwards, since that of the operator is
    being fixed; vllm-ascend does the same (vllm_ascend/quantization/methods/w8a8fp8_dynamic.py at 182b75ea).
    """

    unit = "e4m3fn"
    quantizes_activations = True

    def multiply(
        self,
        q: Packed,
        packed: Packed,
        part: slice,
        bias: Tensor | None,
        dtype: torch.dtype,
        spec: WeightSpec,
    ) -> Tensor:
        weight = packed[0][part].view(_E4M3).t()
        y = self.product(q, weight, packed[1], part, dtype, spec)
        return y if bias is None else y + bias

    @abstractmethod
    def product(
        self, q: Packed, weight: Tensor, scale: Tensor, part: slice, dtype: torch.dtype, spec: WeightSpec
    ) -> Tensor:
        """Calls the operator on ``weight`` ``[k, part]``, with the scales of the whole weight."""


class NpuFp8(_Fp8):
    """A scale for each token, and one for each output channel or one for the whole weight."""

    name = "npu.quant_matmul_fp8"
    calls: ClassVar[Calls] = {
        "npu_dynamic_quant": ("dst_type",),
        "npu_quant_matmul": ("pertoken_scale", "x1_dtype"),
    }
    source = f"{NN} quant/dynamic_quant_v2/docs/aclnnDynamicQuantV2.md, {_V5}"

    def serves(self, scheme: Scheme) -> bool:
        weights = (Quant("e4m3fn", (0, 0)), Quant("e4m3fn", (1, 0)))
        return scheme.weight in weights and scheme.activation == weights[1]

    def activations(self, x: Tensor, spec: WeightSpec) -> Packed:
        q: Packed = torch.ops.npu.npu_dynamic_quant(x, dst_type=_E4M3)
        return q

    def product(
        self, q: Packed, weight: Tensor, scale: Tensor, part: slice, dtype: torch.dtype, spec: WeightSpec
    ) -> Tensor:
        scale = scale.view(-1)[part] if spec.scheme.weight.block_shape[0] else scale.view(-1)
        y: Tensor = torch.ops.npu.npu_quant_matmul(
            q[0], weight, scale, pertoken_scale=q[1], output_dtype=dtype
        )
        return y


class NpuFp8Block(_Fp8):
    """A scale for each 1x128 of the activations and each 128x128 of the weight."""

    name = "npu.quant_matmul_fp8_blocks"
    calls: ClassVar[Calls] = {
        "npu_dynamic_block_quant": ("dst_type",),
        "npu_quant_matmul": ("group_sizes", "x1_dtype"),
    }
    source = f"{NN} quant/dynamic_block_quant/docs/aclnnDynamicBlockQuantV2.md, {_V5}"

    def serves(self, scheme: Scheme) -> bool:
        return (scheme.weight, scheme.activation) == (Quant("e4m3fn", (128, 128)), Quant("e4m3fn", (1, 128)))

    def activations(self, x: Tensor, spec: WeightSpec) -> Packed:
        q: Packed = torch.ops.npu.npu_dynamic_block_quant(
            x, dst_type=_E4M3, row_block_size=1, col_block_size=128
        )
        return q

    def product(
        self, q: Packed, weight: Tensor, scale: Tensor, part: slice, dtype: torch.dtype, spec: WeightSpec
    ) -> Tensor:
        blocks = scale[part.start // 128 : -(-part.stop // 128)].t()
        y: Tensor = torch.ops.npu.npu_quant_matmul(
            q[0], weight, blocks, pertoken_scale=q[1], output_dtype=dtype, group_sizes=[1, 128, 128]
        )
        return y
