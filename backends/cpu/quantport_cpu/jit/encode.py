"""The quantizer kernel: magnitudes, scales and codes of BF16 rows, with each panel of rows read from memory
once.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.core import types

from quantport_cpu.jit.emit import F32, I8, I16, I32, I64, Simd, Value, inline
from quantport_cpu.jit.frame import Kernel, take, word

FP8, INT8, INT4 = 0, 1, 2
LANES = 32
SAFE = (2.0**-60, 2.0**60)  # scales for which the multiplications of quotient neither overflow nor lose bits


@inline(types.int64)
def magnitude(simd: Simd, source: Value, count: Value) -> Value:
    """Largest magnitude of ``count`` bf16 as bits; NaN and Inf are larger than all numbers."""
    (best,) = simd.variables(simd.splat(0, LANES, I16), 1)

    def body(address: Value) -> None:
        v = simd.integer("and_", simd.load(I16, LANES, address), 0x7FFF)
        simd.b.store(simd.same("umax", simd.b.load(best), v), best)

    with simd.steps(count, LANES) as i:
        body(simd.at(source, simd.b.mul(i, I64(2))))
    with simd.rest(count, LANES) as (start, length):
        bounce = simd.buffer(2 * LANES)
        simd.copy(bounce, simd.at(source, simd.b.mul(start, I64(2))), simd.b.mul(length, I64(2)))
        body(bounce)
    return simd.b.zext(simd.total(simd.b.load(best), "umax"), I64)


def quotient(simd: Simd, x: Value, scale: Value, inverse: Value, is_divide: int) -> Value:
    """``x / scale`` as a true division gives it, for bf16 ``x``: a product, and one step of Newton on the
    remainder.
    """
    if is_divide:
        return simd.b.fdiv(x, scale)
    q = simd.b.fmul(x, inverse)
    remainder = simd.same("fma", simd.b.fneg(q), scale, x)
    return simd.same("fma", remainder, inverse, q)


def _e4m3(simd: Simd, q: Value, sign: Value) -> Value:
    """fp32 to e4m3fn bits in int32 lanes. ``sign`` holds the sign in bit 31.

    Adding 2**20 times the power of two of q rounds q to three bits, to nearest even, in the low bits of the
    sum.
    """
    lanes = q.type.count
    q = simd.same("minnum", simd.same("fabs", q), simd.splat(448.0, lanes, F32))
    power = simd.integer("and_", simd.bits(q, I32), 0x7F800000)
    # 2**-6: below it the codes are evenly spaced
    power = simd.same("umax", power, simd.splat(121 << 23, lanes, I32))
    magic = simd.integer("add", power, 20 << 23)
    steps = simd.b.sub(simd.bits(simd.b.fadd(q, simd.bits(magic, F32)), I32), magic)
    exponent = simd.integer("sub", simd.integer("lshr", power, 20), 121 << 3)
    code = simd.b.add(steps, exponent)
    return simd.b.or_(code, simd.integer("and_", simd.integer("lshr", sign, 24), 0x80))


def _integers(simd: Simd, q: Value, low: float, high: float, offset: int) -> Value:
    """fp32 to integers + offset in the low bits of int32 lanes: 1.5 * 2**23 leaves no room for a fraction."""
    lanes = q.type.count
    q = simd.same("minnum", q, simd.splat(high, lanes, F32))
    q = simd.same("maxnum", q, simd.splat(low, lanes, F32))
    return simd.integer("add", simd.bits(simd.b.fadd(q, simd.splat(1.5 * 2.0**23, lanes, F32)), I32), offset)


@inline(types.void, 5, 6)
def encode(
    simd: Simd,
    source: Value,
    to: Value,
    count: Value,
    scale: Value,
    inverse: Value,
    n_kind: int,
    is_divide: int,
) -> None:
    """Codes of ``count`` bf16: a byte each, or for int4 a nibble each."""
    scales, inverses = simd.splat(scale, LANES), simd.splat(inverse, LANES)

    def body(source: Value, to: Value) -> None:
        wide = simd.integer("shl", simd.widen(simd.load(I16, LANES, source), I32), 16)
        q = quotient(simd, simd.bits(wide, F32), scales, inverses, is_divide)
        if n_kind == FP8:
            codes = simd.narrow(_e4m3(simd, q, wide), I8)
        elif n_kind == INT8:
            codes = simd.narrow(_integers(simd, q, -128.0, 127.0, 0), I8)
        else:
            nibbles = simd.narrow(simd.integer("and_", _integers(simd, q, -8.0, 7.0, 8), 15), I8)
            pairs = simd.bits(nibbles, I16, LANES // 2)
            codes = simd.narrow(simd.b.or_(pairs, simd.integer("lshr", pairs, 4)), I8)
        simd.store(codes, to)

    half = I64(1 if n_kind == INT4 else 0)
    with simd.steps(count, LANES) as i:
        body(simd.at(source, simd.b.mul(i, I64(2))), simd.at(to, simd.b.lshr(i, half)))
    with simd.rest(count, LANES) as (start, length):
        bounce, out = simd.buffer(2 * LANES), simd.buffer(LANES)
        simd.copy(bounce, simd.at(source, simd.b.mul(start, I64(2))), simd.b.mul(length, I64(2)))
        body(bounce, out)
        size = simd.b.lshr(simd.b.add(length, half), half)
        simd.copy(simd.at(to, simd.b.lshr(start, half)), out, size)


@inline(types.float32)
def f32(simd: Simd, bits: Value) -> Value:
    """int64 bits as fp32."""
    return simd.b.bitcast(simd.b.trunc(bits, I32), F32)


@inline(types.int64)
def bits32(simd: Simd, value: Value) -> Value:
    """fp32 as int64 bits."""
    return simd.b.zext(simd.b.bitcast(value, I32), I64)


@inline(types.int64)
def get32(simd: Simd, address: Value, index: Value) -> Value:
    """Element of an array of uint32."""
    return simd.b.zext(simd.load(I32, 0, simd.at(address, simd.b.mul(index, I64(4)))), I64)


@inline(types.void)
def put32(simd: Simd, address: Value, index: Value, value: Value) -> None:
    """Sets an element of an array of uint32."""
    simd.store(simd.b.trunc(value, I32), simd.at(address, simd.b.mul(index, I64(4))))


@inline(types.void)
def put16(simd: Simd, address: Value, index: Value, value: Value) -> None:
    """Sets an element of an array of uint16."""
    simd.store(simd.b.trunc(value, I16), simd.at(address, simd.b.mul(index, I64(2))))


@inline(types.void)
def put8(simd: Simd, address: Value, value: Value) -> None:
    """Sets a byte."""
    simd.store(simd.b.trunc(value, I8), address)


@inline(types.int64)
def get8(simd: Simd, address: Value) -> Value:
    """Reads a byte."""
    return simd.b.zext(simd.load(I8, 0, address), I64)


@inline(types.void)
def clear(simd: Simd, address: Value, size: Value) -> None:
    """Sets ``size`` bytes to zero."""
    with simd.steps(size, 1) as i:
        simd.store(I8(0), simd.at(address, i))


@njit(error_model="numpy")
def _scales(scratch, blocks, out, first, half_range, is_bf16):
    """Turns magnitudes ``scratch[:blocks]`` into scales (stored at ``out[first:]``) and their inverses."""
    for c in range(blocks):
        bits = bits32(f32(get32(scratch, c) << 16) / half_range)
        if is_bf16:
            bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
        if bits == 0:
            bits = 0x34000000  # 2**-23
        if is_bf16:
            put16(out, first + c, bits >> 16)
        else:
            put32(out, first + c, bits)
        put32(scratch, blocks + c, bits)
        put32(scratch, 2 * blocks + c, bits32(np.float32(1.0) / f32(bits)))


@njit(error_model="numpy")
def _encode(source, to, count, scale, inverse, kind):
    safe = SAFE[0] < scale < SAFE[1]
    if kind == FP8:
        if safe:
            encode(source, to, count, scale, inverse, FP8, 0)
        else:
            encode(source, to, count, scale, inverse, FP8, 1)
    elif kind == INT8:
        if safe:
            encode(source, to, count, scale, inverse, INT8, 0)
        else:
            encode(source, to, count, scale, inverse, INT8, 1)
    elif safe:
        encode(source, to, count, scale, inverse, INT4, 0)
    else:
        encode(source, to, count, scale, inverse, INT4, 1)


@njit(error_model="numpy")
def end_row(to, k, stride):
    """Zeroes the nibbles past k of an int4 row."""
    if k & 1:
        put8(to + (k >> 1), get8(to + (k >> 1)) & 15)
    clear(to + ((k + 1) >> 1), stride - ((k + 1) >> 1))


def _quantize(frame):
    """A block is a panel of rows that share scales. Words: see ``quantize._run``."""
    source, source_stride, n, k = word(frame, 2), word(frame, 3), word(frame, 4), word(frame, 5)
    rows, cols, to, to_stride = word(frame, 6), word(frame, 7), word(frame, 8), word(frame, 9)
    out, scratch, scratch_stride, kind = word(frame, 10), word(frame, 11), word(frame, 12), word(frame, 13)
    half_range = f32(word(frame, 14))
    blocks = (k + cols - 1) // cols
    while True:
        panel = take(frame)
        if panel >= word(frame, 1):
            break
        first, last, mine = panel * rows, min(n, panel * rows + rows), scratch + panel * scratch_stride
        clear(mine, 4 * blocks)
        for row in range(first, last):
            for c in range(blocks):
                top = magnitude(source + row * source_stride + 2 * c * cols, min(cols, k - c * cols))
                put32(mine, c, max(top, get32(mine, c)))
        _scales(mine, blocks, out, panel * blocks, half_range, kind == INT4)
        for row in range(first, last):
            base = to + row * to_stride
            for c in range(blocks):
                scale, inverse = f32(get32(mine, blocks + c)), f32(get32(mine, 2 * blocks + c))
                start = c * cols
                byte = start >> 1 if kind == INT4 else start
                _encode(
                    source + row * source_stride + 2 * start,
                    base + byte,
                    min(cols, k - start),
                    scale,
                    inverse,
                    kind,
                )
            if kind == INT4:
                end_row(base, k, to_stride)


kernel = Kernel(_quantize)
