"""Generates products of int8 activations with int4 weights as they are stored, exact inside a group.

A byte holds a code of an even column and above it one of an odd column, both plus 8: u8 factors of a dot
product once they are masked. Activations lie in the same order (``prepare_kernel``), together with what takes
the 8 off: -8 times the sum of those that a lane multiplies, with which its integer sum starts. 16-bit
activations are multiplied as integers of 23 bits in three base-256 digits, each of them int8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import Any

import numpy as np
from numba import njit
from numba.core import types

from quantport.backend import once
from quantport_cpu.jit.encode import quantize_int8_row
from quantport_cpu.jit.gemv_bytes import PREFETCH_AHEAD
from quantport_cpu.jit.int_digits import split_row
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import as_bits, as_float, store_uint32, words
from quantport_cpu.jit.simd import F32, I8, I16, I32, I64, Simd, Value, inline
from quantport_cpu.jit.target import host_target

DIGITS = 3  # of 16-bit activations
JOB_BYTES = 64  # eight words
_LONGEST = 128  # columns of a span


@cache
def vector_bytes() -> int:
    """Bytes of the vectors that the target multiplies: of weights, with two codes each."""
    return (host_target().dot_bits or host_target().pair_bits or 128) // 8


@cache
def span_columns(group: int) -> int:
    """Columns whose products are summed as integers: those of a group, or of several that share a vector."""
    return max(2 * vector_bytes(), min(group, _LONGEST))


@cache
def span_bytes(group: int, digits: int) -> int:
    """Bytes of the activations of a span: a vector with the sums of each lane, and the codes."""
    return vector_bytes() + digits * span_columns(group)


@cache
def weight_rows() -> int:
    """Weight rows of a tile: what 32 registers of 512 bits hold, or 16."""
    return 2 if host_target().pair_bits == 512 else 1


@cache
def activation_rows() -> int:
    """Rows of activations of a tile, beside its weight rows."""
    return 4 if host_target().pair_bits else 2


class _Dot:
    """Dot products u8 x s8 of the target, over vectors of ``size`` bytes and int32 lanes.

    Without VNNI the products of a span, below 2**11 each, are added in int16: at most 16 fall on a lane.
    """

    def __init__(self, simd: Simd, group: int) -> None:
        self.simd, self.size, self.lanes = simd, vector_bytes(), vector_bytes() // 4
        self.span = span_columns(group)

    def sum(self, unsigned: Sequence[Value], digits: Value, n_digits: int, start: Value) -> Value:
        """Adds the products of a span to ``start``.

        ``unsigned`` are its vectors of weights, ``digits`` the address of the activations: the codes of each
        digit after those of the higher one.
        """
        s, total = self.simd, None
        for d in range(n_digits):
            if total is not None:
                total = s.int_op("shl", total, 8)
            if d == n_digits - 1:
                total = start if total is None else s.b.add(total, start)
            places = range(d * self.span, (d + 1) * self.span, self.size)
            codes = [s.load(I8, self.size, s.at(digits, i)) for i in places]
            total = self._add(s.splat(0, self.lanes, I32) if total is None else total, unsigned, codes)
        return total

    def _add(self, total: Value, unsigned: Sequence[Value], signed: Sequence[Value]) -> Value:
        s = self.simd
        if s.target.dot_bits:
            for pair in zip(unsigned, signed, strict=True):
                total = s.dot_quads(total, *(s.bitcast(a, I32, self.lanes) for a in pair))
            return total
        short = reduce(s.b.add, map(s.dot_byte_pairs, unsigned, signed))
        return s.b.add(total, s.dot_pairs(short, s.splat(1, 2 * self.lanes, I16)))


def _lane_scales(simd: Simd, address: Value, n_group: int) -> Value:
    """The bf16 scale of each lane of a span as fp32."""
    lanes, parts = vector_bytes() // 4, max(1, span_columns(n_group) // n_group)
    loaded = simd.load(I16, parts, address)
    twice = simd.shuffle(loaded, loaded, [i * parts // (2 * lanes) for i in range(2 * lanes)])
    return simd.bitcast(simd.int_op("shl", simd.bitcast(twice, I32, lanes), 16), F32)


class _Tile:
    """fp32 sums of each weight row times each row of x, span by span."""

    def __init__(self, simd: Simd, n_rows: int, n_m: int, n_group: int, n_digits: int) -> None:
        self.simd, self.dot, self.n_m = simd, _Dot(simd, n_group), n_m
        self.n_group, self.n_digits, self.lanes = n_group, n_digits, self.dot.lanes
        self.totals = simd.variables(simd.splat(0.0, self.lanes, F32), n_rows * n_m)

    def add(self, xs: Sequence[Value], weights: Sequence[Value], scales: Sequence[Value]) -> None:
        """Adds a span: addresses of it in the rows of x, in weight rows, and in their scales."""
        s, size = self.simd, self.dot.size
        nibbles: list[list[Value]] = [[] for _ in weights]
        for found, address in zip(nibbles, weights, strict=True):
            for i in range(0, self.dot.span // 2, size):
                both = s.load(I8, size, s.at(address, i))
                found += [s.int_op("and_", both, 15), s.int_op("lshr", both, 4)]
        factors = [_lane_scales(s, a, self.n_group) for a in scales]
        for m, x in enumerate(xs):
            start = s.load(I32, self.lanes, x)
            for r, (found, factor) in enumerate(zip(nibbles, factors, strict=True)):
                value = s.int_to_float(self.dot.sum(found, s.at(x, size), self.n_digits, start))
                variable = self.totals[r * self.n_m + m]
                s.b.store(s.intrinsic("fma", value, factor, s.b.load(variable)), variable)

    def add_offsets(self, sums: Sequence[Value], zeros: Sequence[Value]) -> None:
        """Adds the offsets of as many groups as there are lanes: addresses of sums of x, and of offsets."""
        s = self.simd
        values = [s.load(F32, self.lanes, a) for a in sums]
        for r, address in enumerate(zeros):
            offset = s.load_bf16(self.lanes, address)
            for value, variable in zip(values, self.totals[r * self.n_m :], strict=False):
                s.b.store(s.intrinsic("fma", value, offset, s.b.load(variable)), variable)


def _add_offsets(simd: Simd, sums: _Tile, xs: Sequence[Value], zeros: Sequence[Value], groups: Value) -> None:
    """Adds the offsets of all groups times the sums of x at ``xs``."""
    with simd.steps(groups, sums.lanes) as i:
        at, here = simd.b.shl(i, I64(2)), simd.b.shl(i, I64(1))
        sums.add_offsets([simd.at(x, at) for x in xs], [simd.at(z, here) for z in zeros])
    bounces = [simd.buffer(2 * sums.lanes) for _ in zeros]
    with simd.remainder(groups, sums.lanes) as (start, count):
        for address, bounce in zip(zeros, bounces, strict=True):
            simd.copy(bounce, simd.at(address, simd.b.shl(start, I64(1))), simd.b.shl(count, I64(1)))
        sums.add_offsets([simd.at(x, simd.b.shl(start, I64(2))) for x in xs], bounces)


@inline(types.void, 13, 14, 15, 16)
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
    n_m: int,
) -> None:
    """``count`` weight rows, up to ``weight_rows()``, times ``n_m`` rows of x in ``n_digits``.

    In place of rows that are not there the last one is multiplied again.
    """
    span, size = span_columns(n_group), span_bytes(n_group, n_digits)
    n_rows, parts = weight_rows(), max(1, span // n_group)
    index = simd.rows_there(count, n_rows)
    rows = [simd.at(w, simd.b.mul(w_stride, i)) for i in index]
    scales = [simd.at(scale, simd.b.mul(scale_stride, i)) for i in index]
    xs = [simd.at(x, simd.b.mul(x_stride, I64(m))) for m in range(n_m)]
    sums = _Tile(simd, n_rows, n_m, n_group, n_digits)
    bounces = [(simd.buffer(span // 2), simd.buffer(2 * parts)) for _ in rows]
    with simd.steps(k, span) as column:
        here = [simd.at(row, simd.b.lshr(column, I64(1))) for row in rows]
        for address in here:
            simd.prefetch(simd.at(address, PREFETCH_AHEAD))
        group = simd.b.shl(simd.b.udiv(column, I64(n_group)), I64(1))
        block = simd.b.mul(simd.b.udiv(column, I64(span)), I64(size))
        sums.add([simd.at(row, block) for row in xs], here, [simd.at(a, group) for a in scales])
    with simd.remainder(k, span) as (start, length):
        group = simd.b.udiv(start, I64(n_group))
        for row, factors, (codes, copied) in zip(rows, scales, bounces, strict=True):
            bytes_ = simd.b.lshr(simd.b.add(length, I64(1)), I64(1))
            simd.copy(codes, simd.at(row, simd.b.lshr(start, I64(1))), bytes_)
            left = simd.b.shl(simd.b.sub(groups, group), I64(1))
            simd.copy(copied, simd.at(factors, simd.b.shl(group, I64(1))), left)
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


def _body(group: int, n_zero: int, digits: int, n_rows: int, most: int) -> Callable[[Any], None]:
    def rows(frame):
        table, blocks_per_job, x_stride, n, k, out_stride, span = words(frame, 2, 7)
        stride, groups = (k + 7) // 8 * 4, (k + group - 1) // group
        scale_stride = groups * 2
        while True:
            block = next_block(frame)
            if block >= block_count(frame):
                break
            job, first = table + JOB_BYTES * (block // blocks_per_job), block % blocks_per_job * span
            x, token, w, scale, zero, out, m = words(job, 0, 7)
            i = 0
            while i < m:
                at, t, left = x + i * x_stride, token + 4 * i, m - i
                width = most if left >= most else 2 if left >= 2 else 1
                for row in range(first, min(n, first + span), n_rows):
                    here, s, z = w + row * stride, scale + row * scale_stride, zero + row * scale_stride
                    y, c = out + 4 * row + i * out_stride, min(n_rows, n - row)
                    # fmt: off
                    if width == most:
                        tile(at, x_stride, t, here, stride, c, k, s, scale_stride, z, groups, y, out_stride,
                             group, n_zero, digits, most)
                    elif width == 2:
                        tile(at, x_stride, t, here, stride, c, k, s, scale_stride, z, groups, y, out_stride,
                             group, n_zero, digits, 2)
                    else:
                        tile(at, x_stride, t, here, stride, c, k, s, scale_stride, z, groups, y, out_stride,
                             group, n_zero, digits, 1)
                    # fmt: on
                i += width

    return rows


@once
def kernel(group: int, has_zero: bool, digits: int) -> Kernel:
    """The kernel of one group size, over jobs: rows of x and the weight that they are multiplied by. A block
    is ``span`` rows of the weight of a job.

    Words: jobs, blocks of a job, stride of x, n, k, stride of out, span. Words of a job: x as
    ``prepare_kernel`` writes it, fp32 scales of its rows, codes, scales, offsets or 0, out, rows of x.
    """
    return Kernel(_body(group, int(has_zero), digits, weight_rows(), activation_rows()))


@inline(types.void, 4, 5)
def arrange_row(
    simd: Simd, planes: Value, plane: Value, k: Value, to: Value, n_group: int, n_digits: int
) -> None:
    """Brings ``k`` int8 of each digit, the low one first, ``plane`` bytes apart, into spans.

    The last span is filled up with zeros.
    """
    dot = _Dot(simd, n_group)
    buffers, eights = [simd.buffer(dot.span) for _ in range(n_digits)], [simd.splat(8, dot.size, I8)]
    sources = [simd.at(planes, simd.b.mul(plane, I64(d))) for d in reversed(range(n_digits))]

    def move(digits: Sequence[Value], column: Value) -> None:
        block = simd.b.mul(simd.b.udiv(column, I64(dot.span)), I64(span_bytes(n_group, n_digits)))
        place = simd.at(to, block)
        for d, source in enumerate(digits):
            for i in range(0, dot.span, 2 * dot.size):
                a, b = (simd.load(I8, dot.size, simd.at(source, i + j)) for j in (0, dot.size))
                for parity in (0, 1):
                    half = simd.shuffle(a, b, range(parity, 2 * dot.size, 2))
                    simd.store(half, simd.at(place, dot.size * (1 + parity) + i + d * dot.span))
        zero = simd.splat(0, dot.lanes, I32)
        sums = dot.sum(eights * (dot.span // dot.size), simd.at(place, dot.size), n_digits, zero)
        simd.store(simd.b.neg(sums), place)

    with simd.steps(k, dot.span) as column:
        move([simd.at(source, column) for source in sources], column)
    with simd.remainder(k, dot.span) as (start, size):
        for source, buffer in zip(sources, buffers, strict=True):
            simd.copy(buffer, simd.at(source, start), size)
        move(buffers, start)


@inline(types.int64)
def sum_of_codes(simd: Simd, codes: Value, count: Value) -> Value:
    """The sum of ``count`` int8."""
    (total,) = simd.variables(simd.splat(0, 16, I32), 1)
    buffer = simd.buffer(16)

    def add(address: Value) -> None:
        wide = simd.widen(simd.load(I8, 16, address), I32, signed=True)
        simd.b.store(simd.b.add(simd.b.load(total), wide), total)

    with simd.steps(count, 16) as i:
        add(simd.at(codes, i))
    with simd.remainder(count, 16) as (start, size):
        simd.copy(buffer, simd.at(codes, start), size)
        add(buffer)
    return simd.b.sext(simd.reduce_lanes(simd.b.load(total)), I64)


@njit(error_model="numpy")
def _group_sums(planes, plane, k, to, group, digits):
    """The sums of the activations of each group as fp32, and zeros to a multiple of 16 groups."""
    groups = (k + group - 1) // group
    for g in range((groups + 15) // 16 * 16):
        total = 0
        for d in range(digits if g < groups else 0):
            here = planes + d * plane + g * group
            total += sum_of_codes(here, min(group, k - g * group)) << (8 * d)
        store_uint32(to, g, as_bits(np.float32(total)))


def _prepare_codes(group: int) -> Callable[[Any], None]:
    def rows(frame):
        codes, codes_stride, k, to, stride = words(frame, 2, 5)
        sums_at, source, source_stride, scales, half_range = words(frame, 7, 5)
        while True:
            row = next_block(frame)
            if row >= block_count(frame):
                break
            here, place = codes + row * codes_stride, to + row * stride
            if source != 0:
                quantize_int8_row(source + row * source_stride, k, here, scales, row, as_float(half_range))
            arrange_row(here, 0, k, place, group, 1)
            if sums_at:
                _group_sums(here, 0, k, place + sums_at, group, 1)

    return rows


@once
def prepare_kernel(group: int) -> Kernel:
    """Brings activations into the form that ``kernel`` reads: quantizes bf16, where there are some, to int8
    codes first. A block is a row.

    Words: codes, their stride, k, where they go, its stride, where in a row the sums of its groups begin (0:
    none are asked for); bf16 or 0, its stride, scales, bits of the half range.
    """
    return Kernel(_prepare_codes(group))


def _prepare_digits(group: int) -> Callable[[Any], None]:
    def rows(frame):
        x, columns, k, digits = words(frame, 2, 4)
        to, stride, sums_at, scales = words(frame, 6, 4)
        while True:
            row = next_block(frame)
            if row >= block_count(frame):
                break
            here, place = digits + 3 * columns * row, to + row * stride
            split_row(x + 4 * columns * row, here, columns, scales, row)
            arrange_row(here, columns, k, place, group, 3)
            if sums_at:
                _group_sums(here, columns, k, place + sums_at, group, 3)

    return rows


@once
def digits_kernel(group: int) -> Kernel:
    """As ``prepare_kernel`` for 16-bit activations: each row becomes ``DIGITS`` int8 rows.

    Words: x fp32, its columns (a multiple of 64), k, scratch for 3 bytes of each column of each row, where
    they go, its stride, where the sums of groups begin or 0, scales.
    """
    return Kernel(_prepare_digits(group))
