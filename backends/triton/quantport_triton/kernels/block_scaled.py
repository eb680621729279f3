"""MX and NVFP4: both operands in 4 or 8 bits, with scales of blocks that the matrix unit of Blackwell applies
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantport.backend import Packed, Quant, Reason, Refusal, Request, Scheme, WeightSpec, aten
from quantport_triton.kernels.base import TritonKernel
from quantport_triton.kernels.tiling import multiply, unaligned
from quantport_triton.launch import Config, target_of
from quantport_triton.quantize import quantize
from quantport_triton.tuned import way

_FORMATS = {"e4m3fn": "e4m3", "e2m1": "e2m1"}
_MX8, _MX4 = (Quant(name, (1, 32), "e8m0") for name in ("e4m3fn", "e2m1"))
_NV4 = Quant("e2m1", (1, 16), "e4m3fn", outer_block=(0, 0))


class TritonBlockScaled(TritonKernel):
    """What these families share. They run where the matrix unit has the formats only; elsewhere weight-only
    kernels are faster.

    The matrix unit multiplies codes and scales exactly and adds in fp32; order alone differs from the
    reference, and ``tolerance`` covers it: half a unit in bf16 is ``2**-9``.

    Attributes:
        pairs: What weight and activations may be; the rule or search that their scales come from does not
            matter.
    """

    oldest = dict.fromkeys(
        ("sm_103", "sm_120", "sm_121"), (3, 6)
    )  # before, the last two multiply bf16 instead
    matrix = ("QMMA.SF", "OMMA.SF", "UTCQMMA", "UTCOMMA")  # those that apply scales of blocks
    tolerance = 2.0**-7
    quantizes_activations = True
    pairs: tuple[tuple[Quant, Quant], ...]

    def serves(self, scheme: Scheme) -> bool:
        plain = [replace(quant, rule="amax") for quant in (scheme.weight, scheme.activation) if quant]
        return tuple(plain) in self.pairs

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        scheme = request.weight.scheme
        units = {quant.unit: None for quant in (scheme.weight, scheme.activation) if quant}
        # Elsewhere Triton would multiply in bf16, which weight-only kernels do with less work.
        native = [
            reason for unit in units for reason in aten.native_reason(request, unit, Refusal.NOT_OFFERED)
        ]
        return native or super().reasons_against(request)  # one reason is enough

    def slow(self, request: Request) -> str:
        return unaligned(request)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        from quantport_triton.ops import block_scaled as ops

        quant, activation, (m, k) = spec.scheme.weight, spec.scheme.activation, x.shape
        assert activation is not None  # serves asks for it
        left = quantize(x, activation)
        codes, scale = packed[:2]
        two = quant.outer_block is not None  # levels of scales
        stored = (
            torch.float8_e4m3fn if two else torch.uint8
        )  # how Triton tells scales per 16 from scales per 32
        y = x.new_empty(m, spec.n)
        tensors = {
            "x": left.codes.view(torch.uint8),
            "x_scale": left.scale.view(stored),
            "codes": codes,
            "scale": scale.view(stored),
        }
        factors = {
            "token_factor": y if left.outer is None else left.outer,
            "row_factor": packed[2] if two else y,
            "bias": y if bias is None else bias,
        }
        numbers = {
            "x_width": left.codes.shape[1],
            "w_width": codes.shape[1],
            "groups_per_row": scale.shape[1],
        }
        constants = {
            "X_FORMAT": _FORMATS[activation.format],
            "W_FORMAT": _FORMATS[quant.format],
            "GROUP": quant.group_size,
            "TOKEN_FACTOR": two,
            "ROW_STRIDE": 0 if two else -1,
        }
        config = way(target_of(x.device), self.family, m)[1]
        blocks = dict(config.blocks)
        blocks["BK"] = blocks["BK"] * 8 // activation.element.bits  # the files count bytes
        blocks["WIDEN"] = blocks.get("WIDEN", 0) * (quant.format != activation.format)
        config = Config(blocks, config.warps, config.stages)
        multiply(
            ops.gemm,
            config,
            y,
            k,
            tensors,
            factors,
            numbers,
            torch.float32,
            True,
            **constants,
            BIAS=bias is not None,
        )
        return y


class TritonMx(TritonBlockScaled):
    """MXFP8, MXFP4, and MXFP4 weights with MXFP8 activations: power-of-two scales per 32."""

    family = "mx"
    pairs = ((_MX8, _MX8), (_MX4, _MX4), (_MX4, _MX8))


class TritonNvfp4(TritonBlockScaled):
    """NVFP4: e4m3fn scales per 16; the factors of the weight and of each token divide the sum."""

    family = "nvfp4"
    pairs = ((_NV4, replace(_NV4, outer_block=(1, 0))),)
