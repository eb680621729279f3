"""Splits activations into base-256 digits: 23-bit integers, which integer dot products multiply exactly."""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.core import types

from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import as_bits, as_float, store_uint32, words
from quantport_cpu.jit.simd import F32, I8, I32, I64, Simd, Value, inline

LANES = 64
DIGIT_ZERO = 0x808080  # an activation of zero: 128 in each of its three base-256 digits
# The largest magnitude as an integer; the margin keeps the rounding inside three digits.
_FULL_SCALE = np.float32(2.0**22 * 0.98)
_LEAST_MAXIMUM = np.float32(2.0**-100)
_EVEN_ODD = [8 * i + j for i in range(LANES // 8) for j in (0, 2, 4, 6, 1, 3, 5, 7)]


@inline(types.int64)
def largest_fp32_bits(simd: Simd, x: Value, count: Value) -> Value:
    """Largest magnitude of ``count`` fp32, a multiple of 64, as bits. NaN and Inf are larger than numbers."""
    (best,) = simd.variables(simd.splat(0, LANES, I32), 1)
    with simd.steps(count, LANES) as i:
        v = simd.load(I32, LANES, simd.at(x, simd.b.mul(i, I64(4))))
        simd.b.store(simd.intrinsic("umax", simd.b.load(best), simd.int_op("and_", v, 0x7FFFFFFF)), best)
    return simd.b.zext(simd.reduce_lanes(simd.b.load(best), "umax"), I64)


@inline(types.void, 4)
def split_digits(simd: Simd, x: Value, to: Value, count: Value, inverse: Value, is_signed: int) -> None:
    """Splits fp32 into three planes of ``count`` digits each, the low ones first.

    Digits are u8 with zero point 128, or s8 with even columns before odd ones. Adding 1.5 * 2**23 (bits
    0x4B400000) to a magnitude below 2**22 lands in [2**23, 2**24), where fp32 holds integers only.
    """
    with simd.steps(count, LANES) as i:
        v = simd.load(F32, LANES, simd.at(x, simd.b.mul(i, I64(4))))
        v = simd.b.fadd(simd.b.fmul(v, simd.splat(inverse, LANES)), simd.splat(1.5 * 2.0**23, LANES, F32))
        number = simd.int_op("add", simd.bitcast(v, I32), DIGIT_ZERO - 0x4B400000)
        for d in range(3):
            digit = simd.narrow(simd.int_op("lshr", number, 8 * d) if d else number, I8)
            if is_signed:
                digit = simd.int_op("xor", simd.shuffle(digit, digit, _EVEN_ODD), -128)
            simd.store(digit, simd.at(simd.at(to, i), simd.b.mul(count, I64(d))))


@inline(types.void)
def group_sums(simd: Simd, digits: Value, group: Value, to: Value) -> None:
    """Four int32 for one digit of one group: -8 times its sums over even and odd columns, then -136 times."""
    (total,) = simd.variables(simd.splat(0, 8, I32), 1)
    with simd.steps(group, 8) as i:
        v = simd.widen(simd.load(I8, 8, simd.at(digits, i)), I32, signed=True)
        simd.b.store(simd.b.add(simd.b.load(total), v), total)
    value = simd.b.load(total)
    for parity in (0, 4):
        part = simd.reduce_lanes(simd.shuffle(value, value, range(parity, parity + 4)))
        simd.store(simd.b.mul(part, I32(-8)), simd.at(to, parity))
        simd.store(simd.b.mul(part, I32(-136)), simd.at(to, 8 + parity))


@njit(error_model="numpy")
def _sums(digits, count, group, to):
    for g in range(count // group):
        for d in range(3):
            group_sums(digits + d * count + g * group, group, to + (3 * g + d) * 16)


def _digits(frame):
    """A block is a row.

    Words: x fp32, padded k, digits, scales fp32, group or 0, sums int32 [M, k/group, 3, 4].
    """
    x, k, to, scales, group, sums = words(frame, 2, 6)
    while True:
        m = next_block(frame)
        if m >= block_count(frame):
            break
        top = as_float(largest_fp32_bits(x + 4 * k * m, k))
        scale = (_LEAST_MAXIMUM if top < _LEAST_MAXIMUM else top) / _FULL_SCALE
        store_uint32(scales, m, as_bits(scale))
        if group:
            split_digits(x + 4 * k * m, to + 3 * k * m, k, np.float32(1.0) / scale, 1)
            _sums(to + 3 * k * m, k, group, sums + m * (k // group) * 48)
        else:
            split_digits(x + 4 * k * m, to + 3 * k * m, k, np.float32(1.0) / scale, 0)


kernel = Kernel(_digits)
