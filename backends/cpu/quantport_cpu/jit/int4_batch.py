"""Multiplies by int4 weights as they are stored, and decodes them: ``gemm_int4`` called with tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantport.backend import numerics
from quantport_cpu.jit import decode as decoding
from quantport_cpu.jit import factors, gemm_fp32, gemm_int4, int4_rows
from quantport_cpu.jit.few_rows import SPAN, is_read_by_each_thread
from quantport_cpu.jit.jobs import PER_TOKEN, Job, all_rows, table
from quantport_cpu.jit.memory import Array, array, array_of_rows
from quantport_cpu.jit.parallel_for import threads_for
from quantport_cpu.jit.quantize_rows import fp32_bits, scratch_bytes
from quantport_cpu.jit.row_call import RowCall
from quantport_cpu.jit.small_batch import empty_fp32, padded_fp32

_FP32_SPAN = 64  # weight rows that a thread takes at a time
_HALF_RANGE = fp32_bits(PER_TOKEN.element.half_range)


class Layout(NamedTuple):
    """How weights are stored.

    Attributes:
        group: Columns that share a scale.
        has_zero: Whether they have offsets, which are added.
        factor: The dtype of scales and offsets, as in ``factors``.
    """

    group: int
    has_zero: bool
    factor: int = factors.BF16


class Int4(NamedTuple):
    """A weight ``[N, K]``, or several of them, ``[..., N, K]``.

    Attributes:
        codes: int32 ``[..., N, ceil(K/8)]``, contiguous.
        scale: bf16, fp16 or fp32 ``[..., N, ceil(K/group)]``, contiguous.
        zero: Offsets that are added, as ``scale``, or None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """How many weights there are, and the rows of one."""
        *several, n, _ = self.codes.shape
        return math.prod(several), n

    def rows(self, first: int, count: int) -> Int4:
        """``count`` rows of a single weight from ``first`` on."""
        part = slice(first, first + count)
        return Int4(self.codes[part], self.scale[part], None if self.zero is None else self.zero[part])

    def arrays(self, k: int, layout: Layout) -> tuple[Array, Array, Array | int]:
        """The memory of each part, checked."""
        rows, groups, dtype = self.codes.shape[:-1], -(-k // layout.group), factors.DTYPES[layout.factor]
        zero = 0 if self.zero is None else array(self.zero, dtype, *rows, groups)
        scale = array(self.scale, dtype, *rows, groups)
        return array(self.codes, torch.int32, *rows, -(-k // 8)), scale, zero


class Rows(NamedTuple):
    """Activations ``[M, K]`` as ``gemm_int4.kernel`` reads them: in its own form, or a few rows of bf16.

    Attributes:
        values: Their codes; 0 for bf16.
        scales: fp32 ``[M]``, or 0.
        source: bf16 ``[M, K]``, which each thread brings into that form for itself, or 0.
        source_stride: Bytes from row to row of ``source``.
        stride: Bytes of a row of codes.
        sums_at: Where in it the sums of groups begin: 0 where none are needed.
        rows: How many there are.
        digits: Digits of a code.
        k: Columns.
        layout: How the weight is stored.
    """

    values: Array | int
    scales: Array | int
    source: Array | int
    source_stride: int
    stride: int
    sums_at: int
    rows: int
    digits: int
    k: int
    layout: Layout


def quantized(x: Tensor, layout: Layout) -> Rows:
    """Activations in int8 with a scale for each row, from any floating dtype: of bf16 in one launch, or in
    the one that multiplies them.
    """
    if x.dtype is not torch.bfloat16 or x.stride(1) != 1:
        return prepared(*numerics.quantize(x, PER_TOKEN), layout)
    return _few_rows(x, layout, 1) or _rows(x, None, empty_fp32(x, x.shape[0]), layout)


def prepared(q: Tensor, token: Tensor, layout: Layout) -> Rows:
    """Activations that are quantized: int8 ``[M, K]`` and fp32 ``[M, 1]``, contiguous."""
    return _rows(q, q, token.view(-1), layout)


def _few_rows(x: Tensor, layout: Layout, digits: int) -> Rows | None:
    (m, k), stride = x.shape, x.stride()
    if x.dtype is not torch.bfloat16 or stride[1] != 1 or not is_read_by_each_thread(m, k):
        return None
    source = array_of_rows(x, torch.bfloat16, m, k)
    return Rows(0, 0, source, 2 * stride[0], *row_bytes(k, layout, digits), m, digits, k, layout)


def _rows(x: Tensor, q: Tensor | None, scales: Tensor, layout: Layout) -> Rows:
    (m, k), tokens = x.shape, array(scales, torch.float32, x.shape[0])
    stride, sums_at = row_bytes(k, layout, 1)
    values = scratch_bytes(x, m * stride)
    source: tuple[Array | int, int] = (0, 0)
    if q is not None:
        codes = array(q, torch.int8, m, k)
    else:
        codes, source = scratch_bytes(x, m * k), (array_of_rows(x, torch.bfloat16, m, k), 2 * x.stride(0))
    int4_rows.prepare_kernel(layout.group)(
        m, codes, k, k, values, stride, sums_at, *source, tokens, _HALF_RANGE, threads=threads_for(m * k)
    )
    return Rows(values, tokens, 0, 0, stride, sums_at, m, 1, k, layout)


def split(x: Tensor, layout: Layout) -> Rows:
    """Activations of any floating dtype as integers of 23 bits with a scale for each row, see
    ``int_digits``.
    """
    digits = int4_rows.DIGITS
    if few := _few_rows(x, layout, digits):
        return few
    (m, k), (stride, sums_at) = x.shape, row_bytes(x.shape[1], layout, digits)
    columns = -(-k // 64) * 64
    values, tokens = scratch_bytes(x, m * stride), array(empty_fp32(x, m), torch.float32, m)
    int4_rows.digits_kernel(layout.group)(
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
    return Rows(values, tokens, 0, 0, stride, sums_at, m, digits, k, layout)


def row_bytes(k: int, layout: Layout, digits: int) -> tuple[int, int]:
    """Bytes of a row of activations, and where in it the sums of groups begin: 0 where none are needed."""
    spans = -(-k // int4_rows.span_columns(layout.group)) * int4_rows.span_bytes(layout.group, digits)
    if not layout.has_zero:
        return spans, 0
    return spans + 64 * -(-k // (16 * layout.group)), spans


def multiply(
    x: Rows, jobs: Sequence[Job], weight: Int4, width: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Activations times weights: exact sums in each group, times the scales of both in fp32.

    Args:
        x: ``[M, K]``.
        jobs: Which rows meet which weight.
        weight: The weight, or several.
        width: Columns of the result.
        dtype: Of the result: fp32, or bf16, to which it is rounded.

    Returns:
        ``[M, width]``.
    """
    (weights, n), m = weight.shape, x.rows
    out = torch.empty(m, width, dtype=dtype, device=weight.codes.device)
    blocks, threads = -(-n // SPAN), threads_for(n * x.k * len(jobs))
    slot = gemm_int4.slot_bytes(x.k, m if x.source else 0, x.stride, x.digits)
    gemm_int4.kernel(*x.layout, x.digits)(
        blocks * len(jobs),
        table(jobs, m, weights, n, width),
        blocks,
        *weight.arrays(x.k, x.layout),
        n,
        x.k,
        x.values,
        x.stride,
        x.sums_at,
        x.scales,
        array(out, dtype, m, width),
        width,
        dtype is torch.bfloat16,
        x.source,
        x.source_stride,
        m,
        _HALF_RANGE,
        threads=threads,
        slot=slot,
    )
    return out


def row(weight: Int4, layout: Layout, k: int, digits: int) -> RowCall:
    """``multiply`` for single rows of ``k`` bf16, as integers of so many digits, and one weight."""
    n, (stride, sums_at) = len(weight.codes), row_bytes(k, layout, digits)
    blocks = -(-n // SPAN)
    before = (
        table(all_rows(1), 1, 1, n, n),
        blocks,
        *weight.arrays(k, layout),
        n,
        k,
        0,
        stride,
        sums_at,
        0,
    )
    kernel, slot = gemm_int4.kernel(*layout, digits), gemm_int4.slot_bytes(k, 1, stride, digits)
    held = [part for part in weight if part is not None]
    return RowCall(kernel, held, before, (2 * k, 1, _HALF_RANGE), (n, k), blocks, slot)


def multiply_fp32(x: Tensor, jobs: Sequence[Job], weight: Int4, layout: Layout, width: int) -> Tensor:
    """Activations times weights in fp32.

    Args:
        x: ``[M, K]``, any floating dtype.
        jobs: Which rows meet which weight.
        weight: The weight, or several.
        layout: How they are stored.
        width: Columns of the result.

    Returns:
        fp32 ``[M, width]``.
    """
    (m, k), (weights, n) = x.shape, weight.shape
    columns, blocks = -(-k // gemm_fp32.STEP) * gemm_fp32.STEP, -(-n // _FP32_SPAN)
    out = empty_fp32(x, m, width).zero_()
    gemm_fp32.kernel(*layout)(
        blocks * len(jobs),
        table(jobs, m, weights, n, width),
        blocks,
        *weight.arrays(k, layout),
        n,
        k,
        array(padded_fp32(x, m, columns), torch.float32, m, columns),
        4 * columns,
        array(out, torch.float32, m, width),
        width,
        _FP32_SPAN,
        threads=threads_for(n * k * len(jobs)),
    )
    return out


def decode(weight: Int4, k: int, layout: Layout, out: Tensor) -> Tensor:
    """Writes the weight to ``out``, bf16 ``[N, K]`` with K filled up to a multiple of 32."""
    n, columns = out.shape
    to = array(out, torch.bfloat16, n, columns)
    decoding.int4_kernel(*layout)(
        n, *weight.arrays(k, layout), k, to, 2 * columns, threads=threads_for(n * k)
    )
    return out
