"""Fits scales and offsets by least squares (``numerics.search.least_squares_grid``), for int4 groups."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.core import types

from quantport.backend import once
from quantport_cpu.jit.encode import clear_row_tail, largest_magnitude
from quantport_cpu.jit.minifloat_encode import pack_codes
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import as_bits, as_float, clear, copy_bytes, load_uint32, store_uint16, words
from quantport_cpu.jit.simd import F32, I32, Simd, Value, inline

GROUP = 64
TRIALS = 9
_ROUNDING_SHIFT = 1.5 * 2.0**23  # fp32 has no fraction there: adding it rounds to nearest even
INFINITY_BITS = 0x7F800000


def clamp_and_round(simd: Simd, x: Value, low: float, high: float) -> Value:
    """fp32 limited to [low, high] and rounded to integers. NaN becomes ``low``."""
    lanes = x.type.count
    x = simd.intrinsic("maxnum", x, simd.splat(low, lanes, F32))
    x = simd.intrinsic("minnum", x, simd.splat(high, lanes, F32))
    shift = simd.splat(_ROUNDING_SHIFT, lanes, F32)
    return simd.b.fsub(simd.b.fadd(x, shift), shift)


@inline(types.void, 3)
def widen_with_range(simd: Simd, source: Value, x: Value, ends: Value, n_size: int) -> None:
    """Stores bf16 as fp32 at ``x``, and the smallest and the largest of them at ``ends``."""
    value = simd.load_bf16(n_size, source)
    simd.store(value, x)
    for i, op in enumerate(("minnum", "maxnum")):
        v = value
        while v.type.count > 1:
            half = v.type.count // 2
            v = simd.intrinsic(op, *(simd.shuffle(v, v, range(at, at + half)) for at in (0, half)))
        simd.store(simd.b.extract_element(v, I32(0)), simd.at(ends, 4 * i))


@inline(types.float32, 2)
def subtract_and_sum(simd: Simd, x: Value, middle: Value, n_size: int) -> Value:
    """Subtracts ``middle`` from every value, and returns the sum of what is left."""
    value = simd.b.fsub(simd.load(F32, n_size, x), simd.splat(middle, n_size))
    simd.store(value, x)
    return simd.reduce_lanes(value)


@inline(types.void, 4, 5)
def code_sums(simd: Simd, x: Value, start: Value, inverse: Value, to: Value, n_size: int, n_top: int) -> None:
    """Sums over the codes q on a grid, three fp32: of q, of q * q and of q * x."""
    value = simd.load(F32, n_size, x)
    q = simd.b.fmul(simd.b.fsub(value, simd.splat(start, n_size)), simd.splat(inverse, n_size))
    q = clamp_and_round(simd, q, 0.0, float(n_top))
    for i, v in enumerate((q, simd.b.fmul(q, q), simd.b.fmul(q, value))):
        simd.store(simd.reduce_lanes(v), simd.at(to, 4 * i))


@inline(types.void, 4)
def encode_int4(simd: Simd, source: Value, to: Value, zero: Value, scale: Value, n_size: int) -> None:
    """int4 codes of bf16 with an offset, each as code + 8."""
    x = simd.b.fsub(simd.load_bf16(n_size, source), simd.splat(zero, n_size))
    q = clamp_and_round(simd, simd.b.fdiv(x, simd.splat(scale, n_size)), -8.0, 7.0)
    simd.store(pack_codes(simd, simd.int_op("add", simd.b.fptosi(q, simd.bitcast(q, I32).type), 8), 4), to)


@njit(error_model="numpy")
def bf16_bits(value):
    """fp32 rounded to bf16, to nearest even, as its bits."""
    bits = as_bits(value)
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF


@once
def solver(size: int, top: int) -> Any:
    """``numerics.search.least_squares_grid`` for ``size`` values, which it shifts by their middle."""
    one, half, size_, top_ = np.float32(1), np.float32(2), np.float32(size), np.float32(top)

    @njit(error_model="numpy")
    def fit(x, sx, start, step, work):
        code_sums(x, start, one / step, work, size, top)
        sq, sqq = as_float(load_uint32(work, 0)), as_float(load_uint32(work, 1))
        sqx = as_float(load_uint32(work, 2))
        covariance, variance = sqx - sq * sx / size_, sqq - sq * sq / size_
        slope = covariance / variance
        return slope, (sx - slope * sq) / size_, covariance * slope

    @njit(error_model="numpy")
    def solve(x, low, high, trials, work):
        middle, reach = low / half + high / half, high / half - low / half
        sx = subtract_and_sum(x, middle, size)
        best, scale, zero = np.float32(0), reach / top_ * half, -reach
        for i in range(TRIALS):
            start = -reach * as_float(load_uint32(trials, 2 * i))
            step = reach / top_ * as_float(load_uint32(trials, 2 * i + 1))
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
def _quantize_group(source, to, scales, zeros, index, trials, work):
    if largest_magnitude(source, GROUP) << 16 >= INFINITY_BITS:
        store_uint16(scales, index, 0x7FC0)
        store_uint16(zeros, index, 0)
        clear(to, GROUP // 2)
        return
    widen_with_range(source, work + 32, work, GROUP)
    low, high = as_float(load_uint32(work, 0)), as_float(load_uint32(work, 1))
    scale, zero = _solve(work + 32, low, high, trials, work)
    zero_bits, scale_bits = bf16_bits(zero + np.float32(8) * scale), bf16_bits(scale)
    if scale_bits & 0x7FFF == 0:
        scale_bits = 0x3400  # 2**-23
    store_uint16(zeros, index, zero_bits)
    store_uint16(scales, index, scale_bits)
    encode_int4(source, to, as_float(zero_bits << 16), as_float(scale_bits << 16), GROUP)


def _rows(frame):
    """A block is a row.

    Words: source, its stride, k, codes, their stride, scales, offsets, trials (fp32), 768 bytes.
    """
    source, source_stride, k, to, to_stride = words(frame, 2, 5)
    scales, zeros, trials, work = words(frame, 7, 4)
    groups, bounce = (k + GROUP - 1) // GROUP, work + 512
    while True:
        row = next_block(frame)
        if row >= block_count(frame):
            break
        for c in range(groups):
            here, codes = source + row * source_stride + 2 * GROUP * c, to + row * to_stride + GROUP // 2 * c
            x, q, rest = here, codes, k - GROUP * c
            if rest < GROUP:  # a short last group is filled with its last value
                x, q = bounce, bounce + 2 * GROUP
                copy_bytes(bounce, here, 2 * rest)
                for i in range(rest, GROUP):
                    copy_bytes(bounce + 2 * i, here + 2 * (rest - 1), 2)
            _quantize_group(x, q, scales, zeros, row * groups + c, trials, work)
            if rest < GROUP:
                copy_bytes(codes, q, (rest + 1) // 2)
        clear_row_tail(to + row * to_stride, k, to_stride)


kernel = Kernel(_rows)
