"""How activations lie that meet int4 weights in dot products, and the kernels that bring them there.

Columns come in spans, whose products are summed as integers: the codes of even columns and those of odd ones,
as in the bytes of a weight, after -8 times the sum of those that each lane multiplies.
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
from quantport_cpu.jit.int_digits import split_row
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import as_bits, as_float, store_uint32, words
from quantport_cpu.jit.simd import I8, I16, I32, I64, Simd, Value, inline
from quantport_cpu.jit.target import host_target

DIGITS = 3  # of 16-bit activations
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


class Dot:
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


@inline(types.void, 4, 5)
def arrange_row(
    simd: Simd, planes: Value, plane: Value, k: Value, to: Value, n_group: int, n_digits: int
) -> None:
    """Brings ``k`` int8 of each digit, the low one first, ``plane`` bytes apart, into spans.

    The last span is filled up with zeros.
    """
    dot = Dot(simd, n_group)
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
def group_sums(planes, plane, k, to, group, digits):
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
                group_sums(here, 0, k, place + sums_at, group, 1)

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
                group_sums(here, columns, k, place + sums_at, group, 3)

    return rows


@once
def digits_kernel(group: int) -> Kernel:
    """As ``prepare_kernel`` for 16-bit activations: each row becomes ``DIGITS`` int8 rows.

    Words: x fp32, its columns (a multiple of 64), k, scratch for 3 bytes of each column of each row, where
    they go, its stride, where the sums of groups begin or 0, scales.
    """
    return Kernel(_prepare_digits(group))
