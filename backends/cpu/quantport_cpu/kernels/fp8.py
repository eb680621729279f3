"""e4m3fn weights with 16-bit activations, decoded by bit operations in row blocks that stay in cache.

``((int16)byte << 7) & 0xBFFF`` read as fp16 is the e4m3fn value / 256, exactly, subnormals included: the
exponent moves from bias 7 to bias 15. ATen's own conversion is scalar, and its fp8 matmul a reference loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantport.backend import Packed, Reason, Request, RowFunction, Scheme, WeightSpec
from quantport_cpu.jit import why_unavailable
from quantport_cpu.jit.jobs import Job, all_rows
from quantport_cpu.kernels.base import (
    TINY,
    CpuGrouped,
    RowRange,
    compiled_max_rows,
    is_plain,
    jobs_of,
    multiply_by_panels,
    result_dtype,
    with_bias,
)
from quantport_cpu.kernels.scratch import scratch

if TYPE_CHECKING:
    from quantport_cpu.jit.grouped_small_batch import Scales
    from quantport_cpu.jit.token_batch import Token

_BLOCK_ROWS = 256
_SMALL_BATCH = (
    4  # up to this many rows, without compiled code, fp16 matrix-vector products beat an fp32 matmul
)


def _halves(codes: Tensor) -> Tensor:
    """fp16 ``[R, K]`` in scratch of the values / 256, from an int8 view of e4m3fn."""
    out = scratch(codes, torch.int16, *codes.shape)
    return out.copy_(codes).mul_(128).bitwise_and_(~0x4000).view(torch.float16)


class CpuFp8WeightOnly(CpuGrouped):
    """W8A16 for every e4m3fn weight: per tensor, per channel, per 128x128 block."""

    name = "cpu.fp8_weight_only"
    tolerance = 2.0**-7

    def serves(self, scheme: Scheme) -> bool:
        quant = scheme.weight
        blocks = quant.block_shape in ((0, 0), (1, 0), (128, 128))
        return quant.format == "e4m3fn" and quant.plain and quant.scale == "fp32" and blocks

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        return ()

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        codes, scale = packed
        blocks, rows = spec.scheme.weight.group_size, x.shape[0]
        if 0 < rows <= compiled_max_rows() and not why_unavailable():
            y = self._products(x, all_rows(rows), packed, spec, spec.n, bias)
            return with_bias(y, bias, x.dtype)
        if not blocks and rows <= _SMALL_BATCH:
            y = self._small_batch(x.float(), codes.view(torch.int8))
        else:
            y = self._large_batch(x, codes.view(torch.int8), scale, blocks)
        if not blocks:
            y.mul_(scale.view(-1))
        return with_bias(y, bias, x.dtype)

    def small_group_rows(self, spec: WeightSpec) -> int:
        return 0 if why_unavailable() else compiled_max_rows()

    def row_function(self, packed: Packed, spec: WeightSpec) -> RowFunction | None:
        if why_unavailable() or not is_plain(packed):
            return None
        from quantport_cpu.jit import gemv_bytes, grouped_small_batch

        scales = self._scales(packed[1], spec)
        return grouped_small_batch.bytes_row(gemv_bytes.E4M3, packed[0], scales)

    def run_one(self, token: Token, gate_up: Packed, down: Packed, spec: WeightSpec) -> Tensor:
        from quantport_cpu.jit import gemv_bytes, token_batch

        has_blocks = spec.scheme.weight.group_size > 0
        return token_batch.codes_of_a_byte(token, gate_up, down, gemv_bytes.E4M3, has_blocks)

    def run_small_groups(
        self, x: Tensor, groups: Sequence[RowRange], stack: Packed, spec: WeightSpec, shared: int
    ) -> Tensor:
        return self._products(x, jobs_of(groups, shared, spec.n), stack, spec, shared * spec.n).to(x.dtype)

    @staticmethod
    def _products(
        x: Tensor,
        jobs: Sequence[Job],
        weights: Packed,
        spec: WeightSpec,
        width: int,
        bias: Tensor | None = None,
    ) -> Tensor:
        from quantport_cpu.jit import grouped_small_batch

        scales = CpuFp8WeightOnly._scales(weights[1], spec)
        return grouped_small_batch.fp8(x, jobs, weights[0], scales, width, result_dtype(x.dtype, bias))

    @staticmethod
    def _scales(scale: Tensor, spec: WeightSpec) -> Scales:
        from quantport_cpu.jit.grouped_small_batch import Scales

        return Scales(blocks=scale) if spec.scheme.weight.group_size else Scales(channels=scale)

    def _small_batch(self, x: Tensor, codes: Tensor) -> Tensor:
        """Matrix-vector products of rows that are scaled into fp16 by a power of two.

        That is exact for all but the tiniest elements of a row.
        """
        n = codes.shape[0]
        out = torch.empty(x.shape[0], n, dtype=torch.float32, device=x.device)
        exponent = torch.frexp(x.abs().amax(-1, keepdim=True).clamp_min_(TINY))[1].float()
        half = torch.ldexp(x, -exponent).half()
        for r in range(0, n, _BLOCK_ROWS):
            weight = _halves(codes[r : r + _BLOCK_ROWS])
            for m in range(x.shape[0]):
                out[m, r : r + _BLOCK_ROWS] = torch.mv(weight, half[m])
        return torch.ldexp(out, exponent + 8)

    def _large_batch(self, x: Tensor, codes: Tensor, scale: Tensor, blocks: int) -> Tensor:
        """A matmul for each panel of the weight, times the scales of 128x128 blocks."""

        def decode(r: int, panel: Tensor) -> Tensor:
            if panel.dtype is torch.bfloat16 and not why_unavailable():
                from quantport_cpu.jit import small_batch

                return small_batch.decode_fp8(codes, scale if blocks else None, r, panel)
            panel.copy_(_halves(codes[r : r + len(panel)]))
            if blocks:
                rows = scale[r // blocks : (r + len(panel) + blocks - 1) // blocks]
                for i, row in enumerate(rows.repeat_interleave(blocks, 1)[:, : codes.shape[1]]):
                    panel[i * blocks : (i + 1) * blocks].mul_(row)
            return panel

        return multiply_by_panels(x, codes.shape[0], codes.shape[1], decode).mul_(256)
