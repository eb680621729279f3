"""Generates products of int8 activations with int4 weights as they are stored, exact inside a group.

A byte holds a code of an even column and above it one of an odd column, both plus 8: u8 factors of a dot
product once they are masked. Activations lie in the same order (``int4_rows``), together with what takes
the 8 off: -8 times the sum of those that a lane multiplies, with which its integer sum starts. 16-bit
activations are multiplied as integers of 23 bits in three base-256 digits, each of them int8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from numba.core import types

from quantport.backend import once
from quantport_cpu.jit import factors
from quantport_cpu.jit.encode import quantize_int8_row
from quantport_cpu.jit.few_rows import SPAN, store_results, widen_row
from quantport_cpu.jit.gemv_bytes import PREFETCH_AHEAD
from quantport_cpu.jit.int4_rows import Dot, arrange_row, group_sums, span_bytes, span_columns, vector_bytes
from quantport_cpu.jit.int_digits import LANES, split_row
from quantport_cpu.jit.jobs import JOB_BYTES
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block, take_slot
from quantport_cpu.jit.scalars import as_float, words
from quantport_cpu.jit.simd import F32, I8, I32, I64, Simd, Value, inline
from quantport_cpu.jit.target import host_target

RESULTS = 4 * 4 * SPAN  # bytes of the results of a block, for the rows of a tile


@cache
def weight_rows() -> int:
    """Weight rows of a tile: what 32 registers of 512 bits hold, or 16."""
    return 2 if host_target().pair_bits == 512 else 1


@cache
def activation_rows() -> int:
    """Rows of activations of a tile, beside its weight rows."""
    return 4 if host_target().pair_bits else 2


def _lane_scales(simd: Simd, address: Value, n_group: int, n_factor: int) -> Value:
    """The scale of each lane of a span."""
    lanes, parts = vector_bytes() // 4, max(1, span_columns(n_group) // n_group)
    return factors.spread(simd, n_factor, parts, address, [i * parts // lanes for i in range(lanes)])


class _Tile:
    """fp32 sums of each weight row times each row of x, span by span."""

    def __init__(self, simd: Simd, n_rows: int, n_m: int, n_group: int, n_digits: int, n_factor: int) -> None:
        self.simd, self.dot, self.n_m = simd, Dot(simd, n_group), n_m
        self.n_group, self.n_digits, self.n_factor = n_group, n_digits, n_factor
        self.lanes = self.dot.lanes
        self.totals = simd.variables(simd.splat(0.0, self.lanes, F32), n_rows * n_m)

    def add(self, xs: Sequence[Value], weights: Sequence[Value], scales: Sequence[Value]) -> None:
        """Adds a span: addresses of it in the rows of x, in weight rows, and in their scales."""
        s, size = self.simd, self.dot.size
        nibbles: list[list[Value]] = [[] for _ in weights]
        for found, address in zip(nibbles, weights, strict=True):
            for i in range(0, self.dot.span // 2, size):
                both = s.load(I8, size, s.at(address, i))
                found += [s.int_op("and_", both, 15), s.int_op("lshr", both, 4)]
        each = [_lane_scales(s, a, self.n_group, self.n_factor) for a in scales]
        for m, x in enumerate(xs):
            start = s.load(I32, self.lanes, x)
            for r, (found, factor) in enumerate(zip(nibbles, each, strict=True)):
                value = s.int_to_float(self.dot.sum(found, s.at(x, size), self.n_digits, start))
                variable = self.totals[r * self.n_m + m]
                s.b.store(s.intrinsic("fma", value, factor, s.b.load(variable)), variable)

    def add_offsets(self, sums: Sequence[Value], zeros: Sequence[Value]) -> None:
        """Adds the offsets of as many groups as there are lanes: addresses of sums of x, and of offsets."""
        s = self.simd
        values = [s.load(F32, self.lanes, a) for a in sums]
        for r, address in enumerate(zeros):
            offset = factors.load(s, self.n_factor, self.lanes, address)
            for value, variable in zip(values, self.totals[r * self.n_m :], strict=False):
                s.b.store(s.intrinsic("fma", value, offset, s.b.load(variable)), variable)


def _add_offsets(simd: Simd, sums: _Tile, xs: Sequence[Value], zeros: Sequence[Value], groups: Value) -> None:
    """Adds the offsets of all groups times the sums of x at ``xs``."""
    size = I64(factors.BYTES[sums.n_factor])
    with simd.steps(groups, sums.lanes) as i:
        at, here = simd.b.shl(i, I64(2)), simd.b.mul(i, size)
        sums.add_offsets([simd.at(x, at) for x in xs], [simd.at(z, here) for z in zeros])
    bounces = [simd.buffer(factors.BYTES[sums.n_factor] * sums.lanes) for _ in zeros]
    with simd.remainder(groups, sums.lanes) as (start, count):
        for address, bounce in zip(zeros, bounces, strict=True):
            simd.copy(bounce, simd.at(address, simd.b.mul(start, size)), simd.b.mul(count, size))
        sums.add_offsets([simd.at(x, simd.b.shl(start, I64(2))) for x in xs], bounces)


@inline(types.void, 13, 14, 15, 16, 17)
def tile(
    simd: Simd,
    x: Value,
    x_stride: Value,
    token: Value,
    w: Value,
    w_stride: Value,
    count: Value,
    k: Value,
    scale: Value,
    scale_stride: Value,
    zero: Value,
    groups: Value,
    out: Value,
    out_stride: Value,
    n_group: int,
    n_zero: int,
    n_digits: int,
    n_factor: int,
    n_m: int,
) -> None:
    """``count`` weight rows, up to ``weight_rows()``, times ``n_m`` rows of x in ``n_digits``.

    In place of rows that are not there the last one is multiplied again.
    """
    span, size, factor = span_columns(n_group), span_bytes(n_group, n_digits), factors.BYTES[n_factor]
    n_rows, parts = weight_rows(), max(1, span // n_group)
    index = simd.rows_there(count, n_rows)
    rows = [simd.at(w, simd.b.mul(w_stride, i)) for i in index]
    scales = [simd.at(scale, simd.b.mul(scale_stride, i)) for i in index]
    xs = [simd.at(x, simd.b.mul(x_stride, I64(m))) for m in range(n_m)]
    sums = _Tile(simd, n_rows, n_m, n_group, n_digits, n_factor)
    bounces = [(simd.buffer(span // 2), simd.buffer(factor * parts)) for _ in rows]
    with simd.steps(k, span) as column:
        here = [simd.at(row, simd.b.lshr(column, I64(1))) for row in rows]
        for address in here:
            simd.prefetch(simd.at(address, PREFETCH_AHEAD))
        group = simd.b.mul(simd.b.udiv(column, I64(n_group)), I64(factor))
        block = simd.b.mul(simd.b.udiv(column, I64(span)), I64(size))
        sums.add([simd.at(row, block) for row in xs], here, [simd.at(a, group) for a in scales])
    with simd.remainder(k, span) as (start, length):
        group = simd.b.udiv(start, I64(n_group))
        for row, stored, (codes, copied) in zip(rows, scales, bounces, strict=True):
            bytes_ = simd.b.lshr(simd.b.add(length, I64(1)), I64(1))
            simd.copy(codes, simd.at(row, simd.b.lshr(start, I64(1))), bytes_)
            left = simd.b.mul(simd.b.sub(groups, group), I64(factor))
            simd.copy(copied, simd.at(stored, simd.b.mul(group, I64(factor))), left)
        block = simd.b.mul(simd.b.udiv(start, I64(span)), I64(size))
        sums.add([simd.at(row, block) for row in xs], *zip(*bounces, strict=True))
    if n_zero:
        spans = simd.b.udiv(simd.b.add(k, I64(span - 1)), I64(span))
        xs = [simd.at(row, simd.b.mul(spans, I64(size))) for row in xs]
        _add_offsets(simd, sums, xs, [simd.at(zero, simd.b.mul(scale_stride, i)) for i in index], groups)
    for r, i in enumerate(index):
        for m in range(n_m):
            value = simd.reduce_lanes(simd.b.load(sums.totals[r * n_m + m]))
            value = simd.b.fmul(value, simd.load(F32, 0, simd.at(token, 4 * m)))
            simd.store(value, simd.fp32_address(out, out_stride, I64(m), i))


def slot_bytes(k: int, rows: int, stride: int, digits: int) -> int:
    """Bytes of a slot of ``kernel``, with ``rows`` of activations, ``stride`` bytes each, that a thread
    brings into spans.
    """
    if not rows:
        return RESULTS
    work = k if digits == 1 else (4 + digits) * -(-k // LANES) * LANES
    return RESULTS + 4 * rows + rows * stride + work


def _body(group: int, n_zero: int, factor: int, digits: int, n_rows: int, most: int) -> Callable[[Any], None]:
    results, factor_bytes = RESULTS, factors.BYTES[factor]

    def rows(frame):
        table, blocks_per_job, weights, scales, zeros, n, k = words(frame, 2, 7)
        x, x_stride, sums_at, token, out, width, is_bf16 = words(frame, 9, 7)
        source, source_stride, m, half_range = words(frame, 16, 4)
        stride, groups = (k + 7) // 8 * 4, (k + group - 1) // group
        scale_stride, slot = groups * factor_bytes, take_slot(frame)
        if source != 0:
            token, x = slot + results, slot + results + 4 * m
            work = x + m * x_stride
            for i in range(m):
                row, place = source + i * source_stride, x + i * x_stride
                if digits == 1:
                    quantize_int8_row(row, k, work, token, i, as_float(half_range))
                    arrange_row(work, 0, k, place, group, 1)
                    if n_zero:
                        group_sums(work, 0, k, place + sums_at, group, 1)
                else:
                    columns = (k + 63) // 64 * 64
                    wide = work + 3 * columns
                    widen_row(row, wide, k, columns)
                    split_row(wide, work, columns, token, i)
                    arrange_row(work, columns, k, place, group, 3)
                    if n_zero:
                        group_sums(work, columns, k, place + sums_at, group, 3)
        while True:
            block = next_block(frame)
            if block >= block_count(frame):
                break
            i, stop, number, column = words(table + JOB_BYTES * (block // blocks_per_job), 0, 4)
            first = block % blocks_per_job * SPAN
            last, w, p = min(n, first + SPAN), weights + number * n * stride, number * n * scale_stride
            scale, zero = scales + p, zeros + p
            while i < stop:
                at, t, left = x + i * x_stride, token + 4 * i, stop - i
                size = most if left >= most else 2 if left >= 2 else 1
                place = i * width + column + first
                to, step = (slot, 4 * SPAN) if is_bf16 else (out + 4 * place, 4 * width)
                for row in range(first, last, n_rows):
                    here, s, z = w + row * stride, scale + row * scale_stride, zero + row * scale_stride
                    y, c = to + 4 * (row - first), min(n_rows, n - row)
                    # fmt: off
                    if size == most:
                        tile(at, x_stride, t, here, stride, c, k, s, scale_stride, z, groups, y, step,
                             group, n_zero, digits, factor, most)
                    elif size == 2:
                        tile(at, x_stride, t, here, stride, c, k, s, scale_stride, z, groups, y, step,
                             group, n_zero, digits, factor, 2)
                    else:
                        tile(at, x_stride, t, here, stride, c, k, s, scale_stride, z, groups, y, step,
                             group, n_zero, digits, factor, 1)
                    # fmt: on
                if is_bf16:
                    store_results(slot, size, out, place, width, last - first, True)
                i += size

    return rows


@once
def kernel(group: int, has_zero: bool, factor: int, digits: int) -> Kernel:
    """The kernel of one group size and one dtype of scales (``factors``), over jobs. A block is ``SPAN`` rows
    of the weight of a job.

    Activations come as ``int4_rows`` writes them, or as a few rows of bf16, which every thread brings
    into that form for itself; results are fp32 or bf16.

    Words: jobs, blocks of a job, codes, scales, offsets or 0, n, k, activations, their stride, where in a row
    the sums of its groups begin (0: none are needed), fp32 scales of the rows, out, its columns, whether it
    is bf16; rows of bf16 or 0, their stride, their number, bits of the half range.
    """
    return Kernel(_body(group, int(has_zero), factor, digits, weight_rows(), activation_rows()))
