"""Quantized activations times quantized weights: e4m3fn times e4m3fn, int8 times int8, int8 times int4.

Scales are those of tokens, rows and groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantport.backend import CodedRows, Packed, Quant, Reason, Request, Scheme, WeightSpec, aten
from quantport_triton import FIRST
from quantport_triton.kernels.base import TritonKernel
from quantport_triton.kernels.tiling import multiply, unaligned
from quantport_triton.launch import Config, target_of
from quantport_triton.quantize import quantize
from quantport_triton.tuned import tuned_config

# Before Triton 3.5, sm_120 and sm_121 multiply fp16 instead of e4m3fn.
_OLDEST_FOR_E4M3FN = {**FIRST, "sm_120": (3, 5), "sm_121": (3, 5)}
# The matrix instructions of a warp, a warp group, and the tensor core of Blackwell.
E4M3FN = ("QMMA", "QGMMA", "UTCQMMA")
INT8 = ("IMMA", "IGMMA", "UTCIMMA")


class TritonScaled(TritonKernel):
    """The base class of these families: the activations are quantized, codes are multiplied, and the scales
    are applied to the sums.

    Products of codes are exact, and so are sums of int8. Sums in fp32 differ from the reference in their
    order, which ``tolerance`` covers: half a unit in the last place of bf16 is ``2**-9``.

    Attributes:
        weights: Quantizations of the weight.
        activation: Quantization of the activations.
    """

    tolerance = 2.0**-7
    quantizes_activations = True
    weights: tuple[Quant, ...]
    activation: Quant

    def serves(self, scheme: Scheme) -> bool:
        return scheme.weight in self.weights and scheme.activation == self.activation

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reasons = aten.native_reason(request, self.activation.format)
        return reasons or super().reasons_against(request)

    def slow(self, request: Request) -> str:
        return unaligned(request)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        # The kernel reads the group scales of all its tokens in one step along K.
        quantized = quantize(x, self.activation, transposed=bool(self.activation.group_size))
        return self.run_codes(CodedRows(quantized.codes, quantized.scale, x.dtype), packed, bias, spec)

    def run_codes(self, x: CodedRows, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        from quantport_triton.ops import scaled as ops

        quant, (m, k) = spec.scheme.weight, x.codes.shape
        weight, row = packed
        weight = weight.view(quant.element.storage) if quant.element.is_float8 else weight
        config = tuned_config(target_of(x.codes.device), self.family, m)
        config = Config({"PROMOTE": 0, **config.blocks}, config.warps, config.stages)
        sums = torch.int32 if self.activation.format == "int8" and not quant.group_size else torch.float32
        y = x.codes.new_empty(m, spec.n, dtype=x.dtype)
        factors = {"token_factor": x.scale, "row_factor": row, "bias": y if bias is None else bias}
        token_step, group_step = x.scale.stride()
        numbers = {
            "w_width": weight.shape[1],
            "groups_per_row": row.shape[1],
            "token_step": token_step,
            "group_step": group_step,
        }
        constants = {
            "GROUP": quant.group_size,
            "TOKEN_FACTOR": not self.activation.group_size,
            "ROW_STRIDE": -1 if quant.group_size else quant.block_shape[0],
            "BIAS": bias is not None,
        }
        tensors = {"x": x.codes, "codes": weight}
        multiply(ops.gemm, config, y, k, tensors, factors, numbers, sums, False, **constants)
        return y


class TritonFp8(TritonScaled):
    """W8A8 e4m3fn: a scale for each token, and one for each output channel or one for the whole weight."""

    family, matrix, oldest = "fp8", E4M3FN, _OLDEST_FOR_E4M3FN
    weights = (Quant("e4m3fn", (0, 0)), Quant("e4m3fn", (1, 0)))
    activation = Quant("e4m3fn", (1, 0))


class TritonFp8Block(TritonScaled):
    """W8A8 e4m3fn: scales of groups of 1 x 128 activations and of blocks of 128 x 128 weights, applied to
    each partial product in fp32.
    """

    family, matrix, oldest = "fp8_block", E4M3FN, _OLDEST_FOR_E4M3FN
    weights = (Quant("e4m3fn", (128, 128)),)
    activation = Quant("e4m3fn", (1, 128))


class TritonInt8(TritonScaled):
    """W8A8 int8: exact sums in int32, then a scale for each token and one for each output channel."""

    family, matrix = "int8", INT8
    weights = (Quant("int8", (1, 0)),)
    activation = Quant("int8", (1, 0))


class TritonInt4Int8(TritonScaled):
    """W4A8: int4 codes become int8 in registers; the exact sum of each group of 128 is scaled and added in
    fp32.
    """

    family, matrix = "int4_int8", INT8
    weights = (Quant("int4", (1, 128), "bf16"),)
    activation = Quant("int8", (1, 0))
