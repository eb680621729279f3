"""Multiplies by int4 weights as they are stored, and decodes them: ``gemm_int4`` called with tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantport.backend import numerics
from quantport_cpu.jit import decode as decoding
from quantport_cpu.jit import gemm_fp32, gemm_int4
from quantport_cpu.jit.grouped_small_batch import output_part
from quantport_cpu.jit.jobs import PER_TOKEN, Job
from quantport_cpu.jit.memory import Array, array, array_of_rows, table
from quantport_cpu.jit.parallel_for import threads_for
from quantport_cpu.jit.quantize_rows import fp32_bits, scratch_bytes
from quantport_cpu.jit.small_batch import SPAN, empty_fp32, padded_fp32

_FP32_SPAN = 64  # weight rows that a thread takes at a time
_HALF_RANGE = fp32_bits(PER_TOKEN.element.half_range)


class Layout(NamedTuple):
    """How weights are stored.

    Attributes:
        group: Columns that share a scale.
        has_zero: Whether they have offsets, which are added.
    """

    group: int
    has_zero: bool


class Int4(NamedTuple):
    """A weight ``[N, K]``.

    Attributes:
        codes: int32 ``[N, ceil(K/8)]``, contiguous.
        scale: bf16 ``[N, ceil(K/group)]``, contiguous.
        zero: Offsets that are added, as ``scale``, or None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    def rows(self, first: int, count: int) -> Int4:
        """``count`` rows from ``first`` on."""
        part = slice(first, first + count)
        return Int4(self.codes[part], self.scale[part], None if self.zero is None else self.zero[part])

    def arrays(self, k: int, group: int) -> tuple[Array, Array, Array | int]:
        """The memory of each part, checked."""
        n, groups = self.codes.shape[0], -(-k // group)
        zero = 0 if self.zero is None else array(self.zero, torch.bfloat16, n, groups)
        scale = array(self.scale, torch.bfloat16, n, groups)
        return array(self.codes, torch.int32, n, -(-k // 8)), scale, zero


class Rows(NamedTuple):
    """Activations ``[M, K]`` as ``gemm_int4.kernel`` reads them.

    Attributes:
        values: Their codes.
        scales: fp32 ``[M]``.
        stride: Bytes of a row.
        digits: Digits of a code.
        k: Columns.
        layout: How the weight is stored.
    """

    values: Array
    scales: Array
    stride: int
    digits: int
    k: int
    layout: Layout


def quantized(x: Tensor, layout: Layout) -> Rows:
    """Activations in int8 with a scale for each row, from any floating dtype: of bf16 in one launch."""
    if x.dtype is torch.bfloat16 and x.stride(1) == 1:
        return _rows(x, None, empty_fp32(x, x.shape[0]), layout)
    q, token = numerics.quantize(x, PER_TOKEN)
    return prepared(q, token, layout)


def prepared(q: Tensor, token: Tensor, layout: Layout) -> Rows:
    """Activations that are quantized: int8 ``[M, K]`` and fp32 ``[M, 1]``, contiguous."""
    return _rows(q, q, token.view(-1), layout)


def _rows(x: Tensor, q: Tensor | None, scales: Tensor, layout: Layout) -> Rows:
    (m, k), tokens = x.shape, array(scales, torch.float32, x.shape[0])
    stride, sums_at = _row_bytes(k, layout, 1)
    values = scratch_bytes(x, m * stride)
    source: tuple[Array | int, int] = (0, 0)
    if q is not None:
        codes = array(q, torch.int8, m, k)
    else:
        codes, source = scratch_bytes(x, m * k), (array_of_rows(x, torch.bfloat16, m, k), 2 * x.stride(0))
    gemm_int4.prepare_kernel(layout.group)(
        m, codes, k, k, values, stride, sums_at, *source, tokens, _HALF_RANGE, threads=threads_for(m * k)
    )
    return Rows(values, tokens, stride, 1, k, layout)


def split(x: Tensor, layout: Layout) -> Rows:
    """Activations of any floating dtype as integers of 23 bits with a scale for each row, see
    ``int_digits``.
    """
    (m, k), digits = x.shape, gemm_int4.DIGITS
    columns, (stride, sums_at) = -(-k // 64) * 64, _row_bytes(k, layout, digits)
    values, tokens = scratch_bytes(x, m * stride), array(empty_fp32(x, m), torch.float32, m)
    gemm_int4.digits_kernel(layout.group)(
        m,
        array(padded_fp32(x, m, columns), torch.float32, m, columns),
        columns,
        k,
        scratch_bytes(x, m * digits * columns),
        values,
        stride,
        sums_at,
        tokens,
        threads=threads_for(m * columns),
    )
    return Rows(values, tokens, stride, digits, k, layout)


def _row_bytes(k: int, layout: Layout, digits: int) -> tuple[int, int]:
    """Bytes of a row of activations, and where in it the sums of groups begin: 0 where none are needed."""
    spans = -(-k // gemm_int4.span_columns(layout.group)) * gemm_int4.span_bytes(layout.group, digits)
    if not layout.has_zero:
        return spans, 0
    return spans + 64 * -(-k // (16 * layout.group)), spans


def multiply(x: Rows, jobs: Sequence[Job], weights: Sequence[Int4], width: int) -> Tensor:
    """Activations times weights: exact sums in each group, times the scales of both in fp32.

    Args:
        x: ``[M, K]``.
        jobs: Which rows meet which weight.
        weights: The weights, all ``[N, K]``, and all with offsets or without.
        width: Columns of the result.

    Returns:
        fp32 ``[M, width]``.
    """
    m, n = x.scales.size // 4, weights[0].codes.shape[0]
    out = empty_fp32(weights[0].codes, m, width)
    to = array(out, torch.float32, m, width)
    lines = table(
        (
            x.values.at(x.stride * a, x.stride * (b - a)),
            x.scales.at(4 * a, 4 * (b - a)),
            *weights[w].arrays(x.k, x.layout.group),
            output_part(to, width, a, b, c, n),
            b - a,
            0,
        )
        for a, b, w, c in jobs
    )
    blocks = -(-n // SPAN)
    gemm_int4.kernel(*x.layout, x.digits)(
        blocks * len(jobs),
        lines,
        blocks,
        x.stride,
        n,
        x.k,
        4 * width,
        SPAN,
        threads=threads_for(n * x.k * len(jobs)),
    )
    return out


def multiply_fp32(
    x: Tensor, jobs: Sequence[Job], weights: Sequence[Int4], layout: Layout, width: int
) -> Tensor:
    """Activations times weights in fp32.

    Args:
        x: ``[M, K]``, any floating dtype.
        jobs: Which rows meet which weight.
        weights: The weights, all ``[N, K]``, and all with offsets or without.
        layout: How they are stored.
        width: Columns of the result.

    Returns:
        fp32 ``[M, width]``.
    """
    (m, k), n = x.shape, weights[0].codes.shape[0]
    columns = -(-k // gemm_fp32.STEP) * gemm_fp32.STEP
    values, out = padded_fp32(x, m, columns), empty_fp32(x, m, width).zero_()
    rows, to = array(values, torch.float32, m, columns), array(out, torch.float32, m, width)
    lines = table(
        (
            rows.at(4 * columns * a, 4 * columns * (b - a)),
            *weights[w].arrays(k, layout.group),
            output_part(to, width, a, b, c, n),
            b - a,
            0,
        )
        for a, b, w, c in jobs
    )
    blocks = -(-n // _FP32_SPAN)
    gemm_fp32.kernel(*layout)(
        blocks * len(jobs),
        lines,
        blocks,
        4 * columns,
        n,
        k,
        4 * width,
        _FP32_SPAN,
        threads=threads_for(n * k * len(jobs)),
    )
    return out


def decode(weight: Int4, k: int, layout: Layout, out: Tensor) -> Tensor:
    """Writes the weight to ``out``, bf16 ``[N, K]`` with K filled up to a multiple of 32."""
    n, columns = out.shape
    to = array(out, torch.bfloat16, n, columns)
    decoding.int4_kernel(*layout)(
        n, *weight.arrays(k, layout.group), k, to, 2 * columns, threads=threads_for(n * k)
    )
    return out
