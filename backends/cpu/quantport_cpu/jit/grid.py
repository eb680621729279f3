"""Scales and offsets by least squared error (``numerics.search.least_squares_grid``), and int4 groups with
them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.core import types

from quantport.backend import once
from quantport_cpu.jit.emit import F32, I32, Simd, Value, inline
from quantport_cpu.jit.encode import bits32, clear, end_row, f32, get32, magnitude, put16
from quantport_cpu.jit.frame import Kernel, take, word
from quantport_cpu.jit.repack import move
from quantport_cpu.jit.small import floats, pack

GROUP = 64
TRIALS = 9
_WHOLE = 1.5 * 2.0**23  # a number this large has no fraction: adding it rounds to nearest even
INFINITE = 0x7F800000


def whole(simd: Simd, x: Value, low: float, high: float) -> Value:
    """fp32 limited to [low, high] and rounded to integers. NaN becomes ``low``."""
    lanes = x.type.count
    x = simd.same("minnum", simd.same("maxnum", x, simd.splat(low, lanes, F32)), simd.splat(high, lanes, F32))
    shift = simd.splat(_WHOLE, lanes, F32)
    return simd.b.fsub(simd.b.fadd(x, shift), shift)


@inline(types.void, 3)
def spread(simd: Simd, source: Value, x: Value, ends: Value, n_size: int) -> None:
    """bf16 to fp32 at ``x``; the smallest and the largest of them at ``ends``."""
    value = floats(simd, source, n_size)
    simd.store(value, x)
    for i, op in enumerate(("minnum", "maxnum")):
        v = value
        while v.type.count > 1:
            half = v.type.count // 2
            v = simd.same(op, *(simd.shuffle(v, v, range(at, at + half)) for at in (0, half)))
        simd.store(simd.b.extract_element(v, I32(0)), simd.at(ends, 4 * i))


@inline(types.float32, 2)
def centre(simd: Simd, x: Value, middle: Value, n_size: int) -> Value:
    """Takes ``middle`` off every value; their sum."""
    value = simd.b.fsub(simd.load(F32, n_size, x), simd.splat(middle, n_size))
    simd.store(value, x)
    return simd.total(value)


@inline(types.void, 4, 5)
def sums(simd: Simd, x: Value, start: Value, inverse: Value, to: Value, n_size: int, n_top: int) -> None:
    """Sums over the codes q on a grid, three fp32: of q, of q * q and of q * x."""
    value = simd.load(F32, n_size, x)
    q = simd.b.fmul(simd.b.fsub(value, simd.splat(start, n_size)), simd.splat(inverse, n_size))
    q = whole(simd, q, 0.0, float(n_top))
    for i, v in enumerate((q, simd.b.fmul(q, q), simd.b.fmul(q, value))):
        simd.store(simd.total(v), simd.at(to, 4 * i))


@inline(types.void, 4)
def nibbles(simd: Simd, source: Value, to: Value, zero: Value, scale: Value, n_size: int) -> None:
    """int4 codes of bf16 with an offset, each as code + 8."""
    x = simd.b.fsub(floats(simd, source, n_size), simd.splat(zero, n_size))
    q = whole(simd, simd.b.fdiv(x, simd.splat(scale, n_size)), -8.0, 7.0)
    simd.store(pack(simd, simd.integer("add", simd.b.fptosi(q, simd.bits(q, I32).type), 8), 4), to)


@njit(error_model="numpy")
def bf16(value):
    """fp32 rounded to bf16, to nearest even, as its bits."""
    bits = bits32(value)
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF


@once
def solver(size: int, top: int) -> Any:
    """``numerics.search.least_squares_grid`` for one block of ``size`` values, which it moves to their
    middle.
    """
    one, half, size_, top_ = np.float32(1), np.float32(2), np.float32(size), np.float32(top)

    @njit(error_model="numpy")
    def fit(x, sx, start, step, work):
        sums(x, start, one / step, work, size, top)
        sq, sqq, sqx = f32(get32(work, 0)), f32(get32(work, 1)), f32(get32(work, 2))
        covariance, variance = sqx - sq * sx / size_, sqq - sq * sq / size_
        slope = covariance / variance
        return slope, (sx - slope * sq) / size_, covariance * slope

    @njit(error_model="numpy")
    def solve(x, low, high, trials, work):
        middle, reach = low / half + high / half, high / half - low / half
        sx = centre(x, middle, size)
        best, scale, zero = np.float32(0), reach / top_ * half, -reach
        for i in range(TRIALS):
            start, step = -reach * f32(get32(trials, 2 * i)), reach / top_ * f32(get32(trials, 2 * i + 1))
            slope, intercept, explained = fit(x, sx, start, step, work)
            if best < explained < np.inf:
                best, scale, zero = explained, slope, intercept
        slope, intercept, explained = fit(x, sx, zero, scale, work)
        if best < explained < np.inf:
            scale, zero = slope, intercept
        return scale, zero + middle

    return solve


_solve = solver(GROUP, 15)


@njit(error_model="numpy")
def _group(source, to, scales, zeros, index, trials, work):
    if magnitude(source, GROUP) << 16 >= INFINITE:
        put16(scales, index, 0x7FC0)
        put16(zeros, index, 0)
        clear(to, GROUP // 2)
        return
    spread(source, work + 32, work, GROUP)
    scale, zero = _solve(work + 32, f32(get32(work, 0)), f32(get32(work, 1)), trials, work)
    zero_bits, scale_bits = bf16(zero + np.float32(8) * scale), bf16(scale)
    if scale_bits & 0x7FFF == 0:
        scale_bits = 0x3400  # 2**-23
    put16(zeros, index, zero_bits)
    put16(scales, index, scale_bits)
    nibbles(source, to, f32(zero_bits << 16), f32(scale_bits << 16), GROUP)


def _rows(frame):
    """A block is a row. Words: source, its stride, k, codes, their stride, scales, offsets, trials (fp32),
    768 bytes.
    """
    source, source_stride, k, to, to_stride = (
        word(frame, 2),
        word(frame, 3),
        word(frame, 4),
        word(frame, 5),
        word(frame, 6),
    )
    scales, zeros, trials, work = word(frame, 7), word(frame, 8), word(frame, 9), word(frame, 10)
    groups, bounce = (k + GROUP - 1) // GROUP, work + 512
    while True:
        row = take(frame)
        if row >= word(frame, 1):
            break
        for c in range(groups):
            here, codes = source + row * source_stride + 2 * GROUP * c, to + row * to_stride + GROUP // 2 * c
            x, q, rest = here, codes, k - GROUP * c
            if rest < GROUP:  # a short last group is filled with its last value
                x, q = bounce, bounce + 2 * GROUP
                move(bounce, here, 2 * rest)
                for i in range(rest, GROUP):
                    move(bounce + 2 * i, here + 2 * (rest - 1), 2)
            _group(x, q, scales, zeros, row * groups + c, trials, work)
            if rest < GROUP:
                move(codes, q, (rest + 1) // 2)
        end_row(to + row * to_stride, k, to_stride)


kernel = Kernel(_rows)
