"""Quantized weights times quantized activations, with scales of rows, tokens or groups: e4m3fn, int8, and
int4 times int8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantport.backend import Packed, Quant, Reason, Request, Scheme, WeightSpec, aten
from quantport_triton import FIRST
from quantport_triton.kernels.base import TritonKernel
from quantport_triton.kernels.tiling import multiply, unaligned
from quantport_triton.launch import Config, target_of
from quantport_triton.quantize import quantize
from quantport_triton.tuned import way

_OLDEST = {**FIRST, "sm_120": (3, 5), "sm_121": (3, 5)}  # before, these multiply fp16 instead of e4m3fn
E4M3FN = ("QMMA", "QGMMA", "UTCQMMA")  # matrix instructions of each width
INT8 = ("IMMA", "IGMMA", "UTCIMMA")


class TritonScaled(TritonKernel):
    """What these families share: activations are quantized, codes are multiplied, scales are applied to the
    sums.

    Products of codes are exact, and so are sums of int8; sums in fp32 and the rounding of the output differ
    from the reference by their order only, which ``tolerance`` covers: half a unit in bf16 is ``2**-9``, and
    the
        reference rounds alike.

    Attributes:
        weights: What the weight may be.
        activation: What the activations must be.
    """

    tolerance = 2.0**-7
    quantizes_activations = True
    weights: tuple[Quant, ...]
    activation: Quant

    def serves(self, scheme: Scheme) -> bool:
        return scheme.weight in self.weights and scheme.activation == self.activation

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        return aten.native_reason(request, self.activation.format) or super().reasons_against(
            request
        )  # one reason is enough

    def slow(self, request: Request) -> str:
        return unaligned(request)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        from quantport_triton.ops import scaled as ops

        quant, (m, k) = spec.scheme.weight, x.shape
        left = quantize(
            x, self.activation, transposed=bool(self.activation.group_size)
        )  # a step reads a column
        codes, scale = packed
        codes = codes.view(quant.element.storage) if quant.element.is_float8 else codes
        config = way(target_of(x.device), self.family, m)[1]
        config = Config({"PROMOTE": 0, **config.blocks}, config.warps, config.stages)
        sums = torch.int32 if self.activation.format == "int8" and not quant.group_size else torch.float32
        y = x.new_empty(m, spec.n)
        factors = {"token_factor": left.scale, "row_factor": scale, "bias": y if bias is None else bias}
        token_step, group_step = left.scale.stride()
        numbers = {
            "w_width": codes.shape[1],
            "groups_per_row": scale.shape[1],
            "token_step": token_step,
            "group_step": group_step,
        }
        row = -1 if quant.group_size else quant.block_shape[0]
        constants = {
            "GROUP": quant.group_size,
            "TOKEN_FACTOR": not self.activation.group_size,
            "ROW_STRIDE": row,
            "BIAS": bias is not None,
        }
        multiply(
            ops.gemm,
            config,
            y,
            k,
            {"x": left.codes, "codes": codes},
            factors,
            numbers,
            sums,
            False,
            **constants,
        )
        return y


class TritonFp8(TritonScaled):
    """W8A8 e4m3fn: a scale for each token, and one for each output channel or for the whole weight."""

    family, matrix, oldest = "fp8", E4M3FN, _OLDEST
    weights = (Quant("e4m3fn", (0, 0)), Quant("e4m3fn", (1, 0)))
    activation = Quant("e4m3fn", (1, 0))


class TritonFp8Block(TritonScaled):
    """W8A8 e4m3fn: scales of 1 x 128 activations and of 128 x 128 weights, applied to each partial product in
    fp32.
    """

    family, matrix, oldest = "fp8_block", E4M3FN, _OLDEST
    weights = (Quant("e4m3fn", (128, 128)),)
    activation = Quant("e4m3fn", (1, 128))


class TritonInt8(TritonScaled):
    """W8A8 int8: exact sums in int32, then a scale for each token and one for each output channel."""

    family, matrix = "int8", INT8
    weights = (Quant("int8", (1, 0)),)
    activation = Quant("int8", (1, 0))


class TritonInt4Int8(TritonScaled):
    """W4A8: int4 codes become int8 in registers; the exact sum over each group of 128 is scaled and added in
    fp32.
    """

    family, matrix = "int4_int8", INT8
    weights = (Quant("int4", (1, 128), "bf16"),)
    activation = Quant("int8", (1, 0))
