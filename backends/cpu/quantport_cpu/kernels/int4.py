"""int4 weights as they are stored: nothing to pack.

int8 activations, and few rows of 16-bit ones, meet the codes in integer dot products, exact inside a group.
More rows of the latter are multiplied in fp32 while the weights are decoded. Very many rows go through panels
of bf16 where the processor multiplies that.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantport.backend import Packed, Reason, Request, RowFunction, Scheme, WeightSpec, aten
from quantport_cpu.jit import why_unavailable
from quantport_cpu.jit.jobs import PER_TOKEN, Job, all_rows
from quantport_cpu.kernels.base import (
    CpuGrouped,
    RowRange,
    has_bf16_dots,
    is_plain,
    jobs_of,
    multiply_by_panels,
    result_dtype,
    why_unavailable_on,
    with_bias,
)
from quantport_cpu.kernels.int8 import quantize_per_token

if TYPE_CHECKING:
    from quantport_cpu.jit.int4_batch import Int4, Layout
    from quantport_cpu.jit.token_batch import Token

_GROUPS = (0, 32, 64, 128, 256)  # columns that share a scale; 0: all
_SCALES = ("bf16", "fp16", "fp32")
_ALL = 1 << 30  # columns of a group that is a whole row
_DIGIT_ROWS = 4  # up to this many 16-bit rows, integer dot products of their digits beat fp32


class CpuInt4(CpuGrouped):
    """W4A16: few rows as exact digits, more in fp32, very many by panels of bf16."""

    name = "cpu.int4"
    tolerance = 2.0**-6
    made_of = "compiled on the machine by numba"
    panel_rows = 64  # above it panels of bf16 are faster, where the processor multiplies bf16

    def serves(self, scheme: Scheme) -> bool:
        quant = scheme.weight
        return (
            quant.format == "int4"
            and quant.block_shape[0] == 1
            and quant.group_size in _GROUPS
            and quant.scale in _SCALES
            and not quant.outer_block
        )

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reason = why_unavailable_on(request.device)
        return [Reason(reason)] if reason else []

    def small_group_rows(self, spec: WeightSpec) -> int:
        return self.panel_rows if has_bf16_dots() else sys.maxsize

    def multiply(
        self,
        x: Tensor,
        jobs: Sequence[Job],
        weight: Int4,
        layout: Layout,
        width: int,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Multiplies rows by weights as the jobs say: ``[M, width]``, fp32 or rounded. No bias is added."""
        from quantport_cpu.jit import int4_batch

        if max(j.stop - j.start for j in jobs) <= _DIGIT_ROWS:
            rows = int4_batch.split(x, layout)
            return int4_batch.multiply(rows, jobs, weight, width, result_dtype(x.dtype, bias))
        return int4_batch.multiply_fp32(x, jobs, weight, layout, width)

    def row_function(self, packed: Packed, spec: WeightSpec) -> RowFunction | None:
        if why_unavailable() or not is_plain(packed):
            return None
        from quantport_cpu.jit import int4_batch, int4_rows

        digits = 1 if self.quantizes_activations else int4_rows.DIGITS
        return int4_batch.row(int4_batch.Int4(*packed), _layout(spec), spec.k, digits)

    def run_one(self, token: Token, gate_up: Packed, down: Packed, spec: WeightSpec) -> Tensor:
        from quantport_cpu.jit import int4_rows, token_batch
        from quantport_cpu.jit.int4_batch import Int4

        digits = 1 if self.quantizes_activations else int4_rows.DIGITS
        return token_batch.int4(token, Int4(*gate_up), Int4(*down), _layout(spec), digits)

    def run_small_groups(
        self, x: Tensor, groups: Sequence[RowRange], stack: Packed, spec: WeightSpec, shared: int
    ) -> Tensor:
        from quantport_cpu.jit import int4_batch

        jobs, weight = jobs_of(groups, shared, spec.n), int4_batch.Int4(*stack)
        return self.multiply(x, jobs, weight, _layout(spec), shared * spec.n).to(x.dtype)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        from quantport_cpu.jit import int4_batch

        rows, weight = x.shape[0], int4_batch.Int4(*packed)
        if not rows:
            y = x.new_zeros(0, spec.n, dtype=torch.float32)
        elif rows <= self.panel_rows or x.dtype is not torch.bfloat16 or not has_bf16_dots():
            y = self.multiply(x, all_rows(rows), weight, _layout(spec), spec.n, bias)
        else:
            y = self.by_panels(x, weight, spec)
        return with_bias(y, bias, x.dtype)

    def by_panels(self, x: Tensor, weight: Int4, spec: WeightSpec) -> Tensor:
        """Multiplies bf16 by panels of bf16: fp32 ``[M, N]``."""
        from quantport_cpu.jit import int4_batch

        return multiply_by_panels(
            x,
            spec.n,
            -(-spec.k // 32) * 32,
            lambda r, panel: int4_batch.decode(weight.rows(r, len(panel)), spec.k, _layout(spec), panel),
        )


class CpuInt4Int8(CpuInt4):
    """W4A8: int8 activations per token, exact sums in each group, scales in fp32."""

    name = "cpu.int4_int8"
    quantizes_activations = True
    panel_rows = 192

    def serves(self, scheme: Scheme) -> bool:
        return super().serves(scheme) and scheme.activation == PER_TOKEN

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        return [*aten.native_reason(request, "int8"), *super().reasons_against(request)]

    def multiply(
        self,
        x: Tensor,
        jobs: Sequence[Job],
        weight: Int4,
        layout: Layout,
        width: int,
        bias: Tensor | None = None,
    ) -> Tensor:
        from quantport_cpu.jit import int4_batch

        rows = int4_batch.quantized(x, layout)
        return int4_batch.multiply(rows, jobs, weight, width, result_dtype(x.dtype, bias))

    def by_panels(self, x: Tensor, weight: Int4, spec: WeightSpec) -> Tensor:
        q, token = quantize_per_token(x)  # bf16 holds these codes exactly
        return super().by_panels(q.bfloat16(), weight, spec).mul_(token)


def _layout(spec: WeightSpec) -> Layout:
    from quantport_cpu.jit.factors import DTYPES
    from quantport_cpu.jit.int4_batch import Layout

    quant = spec.scheme.weight
    return Layout(quant.group_size or _ALL, quant.zero_point, DTYPES.index(quant.scale_dtype))
