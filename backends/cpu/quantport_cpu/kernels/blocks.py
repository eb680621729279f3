"""Small floats and code books with block scales: MX, NVFP4, dual scale, NF4, FP4 and FP6, weight-only.

Weights stay as they are stored. Few rows of activations are multiplied in one pass over the codes; for many,
panels of rows that stay in cache are decoded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantport.backend import Packed, Reason, Request, Scheme, WeightSpec, numerics
from quantport_cpu.kernels.base import CpuStacked, multiply_by_panels, why_unavailable_on

_FORMATS = ("e2m1", "e2m3", "e3m2", "e4m3fn", "nf4", "fp4")
_OUTER = 512  # columns that share an outer scale
_SMALL_BATCH = 32  # up to this many rows, multiplying codes beats decoding panels


class CpuBlocks(CpuStacked):
    """W4A16, W6A16 and W8A16 of block formats."""

    name = "cpu.blocks"
    tolerance = 2.0**-7
    made_of = "compiled on the machine by numba"

    def serves(self, scheme: Scheme) -> bool:
        quant = scheme.weight
        if (
            quant.format not in _FORMATS
            or quant.block_shape[0] != 1
            or quant.zero_point
            or (quant.format, quant.scale) == ("e4m3fn", "fp32")
        ):
            return False
        if quant.scale == "e4m3fn":
            return quant.group_size == 16 and quant.outer_block in (None, (0, 0))
        outer = quant.outer_block is None or (quant.scale == "e8m0" and quant.outer_block == (1, _OUTER))
        return (
            quant.scale in ("e8m0", "fp32") and quant.group_size > 0 and quant.group_size % 32 == 0 and outer
        )

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reasons = [Reason(reason)] if (reason := why_unavailable_on(request.device)) else []
        if request.weight.k % 32:
            reasons.append(Reason(f"it takes K in multiples of 32, not {request.weight.k}"))
        return reasons

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        from quantport_cpu.jit import small_batch

        quant, rows = spec.scheme.weight, x.shape[0]
        outer = packed[2] if quant.outer_block and quant.scale == "e8m0" else None
        scale = numerics.dequantize_scales(self.unpack(packed, spec)) if quant.scale_quant else packed[1]
        weight = small_batch.Blocks(
            quant.format, quant.scale, quant.group_size, packed[0], scale, outer, spec.k
        )
        if rows <= _SMALL_BATCH:
            y = small_batch.blocks(x, weight) if rows else x.new_zeros(0, spec.n, dtype=torch.float32)
        else:
            y = multiply_by_panels(
                x, spec.n, spec.k, lambda r, panel: small_batch.decode(weight.rows(r, len(panel)), panel)
            )
        if (unit := small_batch.unit(weight)) != 1:
            y.mul_(unit)
        if quant.outer_block == (0, 0):
            y.div_(packed[2])
        return (y if bias is None else y.add_(bias)).to(x.dtype)
