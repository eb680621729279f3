"""Quantizes panels of BF16 or FP32 rows to e4m3fn, int8 or int4, with a scale for a span of columns of each.

The rows of a panel are read from memory once: for their largest magnitudes, and again for their codes from
cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.core import types

from quantport.backend import once
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import (
    as_bits,
    as_float,
    clear,
    load_uint8,
    load_uint32,
    store_uint8,
    store_uint16,
    store_uint32,
    words,
)
from quantport_cpu.jit.simd import F32, I8, I16, I32, I64, Simd, Value, inline

FP8, INT8, INT4 = 0, 1, 2
BF16, FP32 = 2, 4  # bytes of an element of the source
LANES = 32
ZERO_SCALE = 0x34000000  # 2**-23, of zeros: bits of fp32
# Between these scales the multiplications of ``quotient`` neither overflow nor lose bits.
SAFE_SCALES = (2.0**-60, 2.0**60)


@inline(types.int64)
def largest_magnitude(simd: Simd, source: Value, count: Value) -> Value:
    """Largest magnitude of ``count`` bf16 as bits; NaN and Inf are larger than all numbers."""
    return _largest(simd, source, count, I16, BF16)


@inline(types.int64)
def largest_fp32(simd: Simd, source: Value, count: Value) -> Value:
    """As ``largest_magnitude``, of fp32."""
    return _largest(simd, source, count, I32, FP32)


def _largest(simd: Simd, source: Value, count: Value, kind: Any, size: int) -> Value:
    (best,) = simd.variables(simd.splat(0, LANES, kind), 1)

    def body(address: Value) -> None:
        v = simd.int_op("and_", simd.load(kind, LANES, address), (1 << 8 * size - 1) - 1)
        simd.b.store(simd.intrinsic("umax", simd.b.load(best), v), best)

    with simd.steps(count, LANES) as i:
        body(simd.at(source, simd.b.mul(i, I64(size))))
    with simd.remainder(count, LANES) as (start, length):
        bounce = simd.buffer(size * LANES)
        simd.copy(bounce, simd.at(source, simd.b.mul(start, I64(size))), simd.b.mul(length, I64(size)))
        body(bounce)
    return simd.b.zext(simd.reduce_lanes(simd.b.load(best), "umax"), I64)


def quotient(simd: Simd, x: Value, scale: Value, inverse: Value, is_divide: int) -> Value:
    """``x / scale`` for bf16 ``x``, correctly rounded.

    Without ``is_divide`` it is a product with ``inverse``, corrected by one step of Newton on the remainder.
    """
    if is_divide:
        return simd.b.fdiv(x, scale)
    q = simd.b.fmul(x, inverse)
    remainder = simd.intrinsic("fma", simd.b.fneg(q), scale, x)
    return simd.intrinsic("fma", remainder, inverse, q)


def _encode_e4m3(simd: Simd, q: Value, sign: Value) -> Value:
    """fp32 to e4m3fn bits in int32 lanes. ``sign`` holds the sign in bit 31.

    Adding 2**20 times the power of two of q rounds q to three bits, to nearest even, in the low bits of the
    sum.
    """
    lanes = q.type.count
    q = simd.intrinsic("minnum", simd.intrinsic("fabs", q), simd.splat(448.0, lanes, F32))
    power = simd.int_op("and_", simd.bitcast(q, I32), 0x7F800000)
    # 2**-6: below it the codes are evenly spaced
    power = simd.intrinsic("umax", power, simd.splat(121 << 23, lanes, I32))
    magic = simd.int_op("add", power, 20 << 23)
    steps = simd.b.sub(simd.bitcast(simd.b.fadd(q, simd.bitcast(magic, F32)), I32), magic)
    exponent = simd.int_op("sub", simd.int_op("lshr", power, 20), 121 << 3)
    code = simd.b.add(steps, exponent)
    return simd.b.or_(code, simd.int_op("and_", simd.int_op("lshr", sign, 24), 0x80))


def encode_integers(simd: Simd, q: Value, low: float, high: float, offset: int) -> Value:
    """fp32 to integers + offset in the low bits of int32 lanes: 1.5 * 2**23 leaves no room for a fraction."""
    lanes = q.type.count
    q = simd.intrinsic("minnum", q, simd.splat(high, lanes, F32))
    q = simd.intrinsic("maxnum", q, simd.splat(low, lanes, F32))
    q = simd.b.fadd(q, simd.splat(1.5 * 2.0**23, lanes, F32))
    return simd.int_op("add", simd.bitcast(q, I32), offset)


@inline(types.void, 5, 6, 7)
def encode(
    simd: Simd,
    source: Value,
    to: Value,
    count: Value,
    scale: Value,
    inverse: Value,
    n_kind: int,
    n_size: int,
    is_divide: int,
) -> None:
    """Codes of ``count`` bf16 or fp32: a byte each, or for int4 a nibble each."""
    # scales by which bf16 must be divided are rare: short code, which compiles sooner
    lanes = 8 if is_divide and n_size == BF16 else LANES
    scales, inverses = simd.splat(scale, lanes), simd.splat(inverse, lanes)

    def body(source: Value, to: Value) -> None:
        x = simd.load_bf16(lanes, source) if n_size == BF16 else simd.load(F32, lanes, source)
        q = quotient(simd, x, scales, inverses, is_divide)
        if n_kind == FP8:
            codes = simd.narrow(_encode_e4m3(simd, q, simd.bitcast(x, I32)), I8)
        elif n_kind == INT8:
            codes = simd.narrow(encode_integers(simd, q, -128.0, 127.0, 0), I8)
        else:
            nibbles = simd.narrow(simd.int_op("and_", encode_integers(simd, q, -8.0, 7.0, 8), 15), I8)
            pairs = simd.bitcast(nibbles, I16, lanes // 2)
            codes = simd.narrow(simd.b.or_(pairs, simd.int_op("lshr", pairs, 4)), I8)
        simd.store(codes, to)

    half, size = I64(1 if n_kind == INT4 else 0), I64(n_size)
    with simd.steps(count, lanes) as i:
        body(simd.at(source, simd.b.mul(i, size)), simd.at(to, simd.b.lshr(i, half)))
    with simd.remainder(count, lanes) as (start, length):
        bounce, out = simd.buffer(n_size * lanes), simd.buffer(lanes)
        simd.copy(bounce, simd.at(source, simd.b.mul(start, size)), simd.b.mul(length, size))
        body(bounce, out)
        written = simd.b.lshr(simd.b.add(length, half), half)
        simd.copy(simd.at(to, simd.b.lshr(start, half)), out, written)


@njit(error_model="numpy")
def _scales(scratch, blocks, out, first, half_range, is_bf16):
    """Stores scales at ``out[first:]``; in ``scratch``, magnitudes are followed by scales and inverses."""
    for c in range(blocks):
        bits = as_bits(as_float(load_uint32(scratch, c)) / half_range)
        if is_bf16:
            bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
        if bits == 0:
            bits = ZERO_SCALE
        if is_bf16:
            store_uint16(out, first + c, bits >> 16)
        else:
            store_uint32(out, first + c, bits)
        store_uint32(scratch, blocks + c, bits)
        store_uint32(scratch, 2 * blocks + c, as_bits(np.float32(1.0) / as_float(bits)))


@njit(error_model="numpy", inline="always")
def _encode_run(source, to, count, scale, inverse, kind):
    """As ``encode`` of bf16; ``kind`` is a constant, so that one format is compiled and not all."""
    if SAFE_SCALES[0] < scale < SAFE_SCALES[1]:
        encode(source, to, count, scale, inverse, kind, BF16, 0)
    else:
        encode(source, to, count, scale, inverse, kind, BF16, 1)


@njit(error_model="numpy")
def quantize_int8_row(source, k, to, scales, row, half_range):
    """Quantizes one row of bf16 to int8 with one scale, ``scales[row]``."""
    bits = as_bits(as_float(largest_magnitude(source, k) << 16) / half_range)
    if bits == 0:
        bits = ZERO_SCALE
    store_uint32(scales, row, bits)
    _encode_run(source, to, k, as_float(bits), np.float32(1.0) / as_float(bits), INT8)


@njit(error_model="numpy")
def clear_row_tail(to, k, stride):
    """Zeroes the nibbles past k of an int4 row."""
    if k & 1:
        store_uint8(to + (k >> 1), load_uint8(to + (k >> 1)) & 15)
    clear(to + ((k + 1) >> 1), stride - ((k + 1) >> 1))


def _body(kind: int, size: int = BF16) -> Any:
    def quantize(frame):
        source, source_stride, n, k = words(frame, 2, 4)
        rows, cols, to, to_stride = words(frame, 6, 4)
        out, scratch, scratch_stride, half_range = words(frame, 10, 4)
        half_range = as_float(half_range)
        blocks = (k + cols - 1) // cols
        while True:
            panel = next_block(frame)
            if panel >= block_count(frame):
                break
            first, last, panel_scratch = (
                panel * rows,
                min(n, panel * rows + rows),
                scratch + panel * scratch_stride,
            )
            clear(panel_scratch, 4 * blocks)
            for row in range(first, last):
                for c in range(blocks):
                    here, count = source + row * source_stride + size * c * cols, min(cols, k - c * cols)
                    top = largest_fp32(here, count) if size == FP32 else largest_magnitude(here, count) << 16
                    store_uint32(panel_scratch, c, max(top, load_uint32(panel_scratch, c)))
            _scales(panel_scratch, blocks, out, panel * blocks, half_range, kind == INT4)
            for row in range(first, last):
                base = to + row * to_stride
                for c in range(blocks):
                    scale = as_float(load_uint32(panel_scratch, blocks + c))
                    inverse = as_float(load_uint32(panel_scratch, 2 * blocks + c))
                    start, count = c * cols, min(cols, k - c * cols)
                    here = source + row * source_stride + size * start
                    byte = start >> 1 if kind == INT4 else start
                    if size == FP32:  # a step of Newton does not always round its quotients correctly
                        encode(here, base + byte, count, scale, inverse, kind, FP32, 1)
                    else:
                        _encode_run(here, base + byte, count, scale, inverse, kind)
                if kind == INT4:
                    clear_row_tail(base, k, to_stride)

    return quantize


@once
def kernel(kind: int, size: int = BF16) -> Kernel:
    """The kernel of a format. A block is a panel of rows that share scales. Words: see ``quantize._run``."""
    return Kernel(_body(kind, size))
