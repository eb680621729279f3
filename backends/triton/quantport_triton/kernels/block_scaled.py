"""MX and NVFP4: both operands in 4 or 8 bits, with block scales that the matrix unit of Blackwell applies."""

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
from quantport_triton.tuned import tuned_config

_FORMATS = {"e4m3fn": "e4m3", "e2m1": "e2m1"}
_MX8, _MX4 = (Quant(name, (1, 32), "e8m0") for name in ("e4m3fn", "e2m1"))
_NV4 = Quant("e2m1", (1, 16), "e4m3fn", outer_block=(0, 0))


class TritonBlockScaled(TritonKernel):
    """The base class of these families, which run only where the matrix unit has the formats; elsewhere
    weight-only kernels are faster.

    The matrix unit multiplies codes and scales exactly and adds in fp32. Only the order of the sum differs
    from the reference, which ``tolerance`` covers: half a unit in the last place of bf16 is ``2**-9``.

    Attributes:
        pairs: Quantizations of weight and activations; the rule or search of their scales is ignored.
    """

    # Before Triton 3.6, sm_120 and sm_121 multiply bf16 instead.
    oldest = dict.fromkeys(("sm_103", "sm_120", "sm_121"), (3, 6))
    matrix = ("QMMA.SF", "OMMA.SF", "UTCQMMA", "UTCOMMA")  # these apply block scales
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
        reasons = [r for unit in units for r in aten.native_reason(request, unit, Refusal.NOT_OFFERED)]
        return reasons or super().reasons_against(request)

    def slow(self, request: Request) -> str:
        return unaligned(request)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        from quantport_triton.ops import block_scaled as ops

        quant, activation, (m, k) = spec.scheme.weight, spec.scheme.activation, x.shape
        assert activation is not None
        quantized = quantize(x, activation)
        codes, scale = packed[:2]
        two_levels = quant.outer_block is not None
        # Triton tells scales per 16 and per 32 columns apart by their dtype.
        scale_dtype = torch.float8_e4m3fn if two_levels else torch.uint8
        y = x.new_empty(m, spec.n)
        tensors = {
            "x": quantized.codes.view(torch.uint8),
            "x_scale": quantized.scale.view(scale_dtype),
            "codes": codes,
            "scale": scale.view(scale_dtype),
        }
        factors = {
            "token_factor": y if quantized.outer is None else quantized.outer,
            "row_factor": packed[2] if two_levels else y,
            "bias": y if bias is None else bias,
        }
        numbers = {
            "x_width": quantized.codes.shape[1],
            "w_width": codes.shape[1],
            "groups_per_row": scale.shape[1],
        }
        constants = {
            "X_FORMAT": _FORMATS[activation.format],
            "W_FORMAT": _FORMATS[quant.format],
            "GROUP": quant.group_size,
            "TOKEN_FACTOR": two_levels,
            "ROW_STRIDE": 0 if two_levels else -1,
            "BIAS": bias is not None,
        }
        config = tuned_config(target_of(x.device), self.family, m)
        blocks = dict(config.blocks)
        blocks["BK"] = blocks["BK"] * 8 // activation.element.bits  # the configurations count bytes
        blocks["WIDEN"] = blocks.get("WIDEN", 0) * (quant.format != activation.format)
        config = Config(blocks, config.warps, config.stages)
        multiply(ops.gemm, config, y, k, tensors, factors, numbers, torch.float32, True, **constants)
        return y


class TritonMx(TritonBlockScaled):
    """MXFP8, MXFP4, and MXFP4 weights with MXFP8 activations: power-of-two scales per 32."""

    family = "mx"
    pairs = ((_MX8, _MX8), (_MX4, _MX4), (_MX4, _MX8))


class TritonNvfp4(TritonBlockScaled):
    """NVFP4: e4m3fn scales per 16; the factors of the weight and of each token divide the sum."""

    family = "nvfp4"
    pairs = ((_NV4, replace(_NV4, outer_block=(1, 0))),)
