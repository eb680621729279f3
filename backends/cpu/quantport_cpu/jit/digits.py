"""Activations as 23-bit integers in three base-256 digits, which integer dot products then multiply
exactly.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.core import types

from quantport_cpu.jit.dots import DIGIT_ZERO
from quantport_cpu.jit.emit import F32, I8, I32, I64, Simd, Value, inline
from quantport_cpu.jit.encode import bits32, f32, put32
from quantport_cpu.jit.frame import Kernel, take, word

LANES = 64
# largest magnitude as an integer; the margin keeps the rounding inside three digits
_FULL = np.float32(2.0**22 * 0.98)
_LEAST = np.float32(2.0**-100)
_EVEN_ODD = [8 * i + j for i in range(LANES // 8) for j in (0, 2, 4, 6, 1, 3, 5, 7)]


@inline(types.int64)
def top32(simd: Simd, x: Value, count: Value) -> Value:
    """Largest magnitude of fp32 values as bits; ``count`` is a multiple of 64. NaN and Inf are larger than
    numbers.
    """
    (best,) = simd.variables(simd.splat(0, LANES, I32), 1)
    with simd.steps(count, LANES) as i:
        v = simd.load(I32, LANES, simd.at(x, simd.b.mul(i, I64(4))))
        simd.b.store(simd.same("umax", simd.b.load(best), simd.integer("and_", v, 0x7FFFFFFF)), best)
    return simd.b.zext(simd.total(simd.b.load(best), "umax"), I64)


@inline(types.void, 4)
def split(simd: Simd, x: Value, to: Value, count: Value, inverse: Value, is_signed: int) -> None:
    """Three planes of ``count`` digits each, low first: u8 with zero point 128, or s8 with even columns
    before odd ones.

    Adding 1.5 * 2**23 (bits 0x4B400000) to a magnitude below 2**22 lands in [2**23, 2**24): fp32 there holds
    integers only.
    """
    with simd.steps(count, LANES) as i:
        v = simd.load(F32, LANES, simd.at(x, simd.b.mul(i, I64(4))))
        v = simd.b.fadd(simd.b.fmul(v, simd.splat(inverse, LANES)), simd.splat(1.5 * 2.0**23, LANES, F32))
        number = simd.integer("add", simd.bits(v, I32), DIGIT_ZERO - 0x4B400000)
        for d in range(3):
            digit = simd.narrow(simd.integer("lshr", number, 8 * d) if d else number, I8)
            if is_signed:
                digit = simd.integer("xor", simd.shuffle(digit, digit, _EVEN_ODD), -128)
            simd.store(digit, simd.at(simd.at(to, i), simd.b.mul(count, I64(d))))


@inline(types.void)
def group_sums(simd: Simd, digits: Value, group: Value, to: Value) -> None:
    """Four int32 for one digit of one group: -8 and -136 times the sum over even columns, then over
    odd ones.
    """
    (total,) = simd.variables(simd.splat(0, 8, I32), 1)
    with simd.steps(group, 8) as i:
        v = simd.widen(simd.load(I8, 8, simd.at(digits, i)), I32, signed=True)
        simd.b.store(simd.b.add(simd.b.load(total), v), total)
    value = simd.b.load(total)
    for parity in (0, 4):
        part = simd.total(simd.shuffle(value, value, range(parity, parity + 4)))
        simd.store(simd.b.mul(part, I32(-8)), simd.at(to, parity))
        simd.store(simd.b.mul(part, I32(-136)), simd.at(to, 8 + parity))


@njit(error_model="numpy")
def _sums(digits, count, group, to):
    for g in range(count // group):
        for d in range(3):
            group_sums(digits + d * count + g * group, group, to + (3 * g + d) * 16)


def _digits(frame):
    """A block is a row. Words: x fp32, padded k, digits, scales fp32, group or 0, sums int32 [M, k/group, 3,
    4].
    """
    x, k, to, scales = word(frame, 2), word(frame, 3), word(frame, 4), word(frame, 5)
    group, sums = word(frame, 6), word(frame, 7)
    while True:
        m = take(frame)
        if m >= word(frame, 1):
            break
        top = f32(top32(x + 4 * k * m, k))
        scale = (_LEAST if top < _LEAST else top) / _FULL
        put32(scales, m, bits32(scale))
        if group:
            split(x + 4 * k * m, to + 3 * k * m, k, np.float32(1.0) / scale, 1)
            _sums(to + 3 * k * m, k, group, sums + m * (k // group) * 48)
        else:
            split(x + 4 * k * m, to + 3 * k * m, k, np.float32(1.0) / scale, 0)


kernel = Kernel(_digits)
