"""Splits activations into base-256 digits: 23-bit integers, which integer dot products multiply exactly."""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.core import types

from quantport_cpu.jit.scalars import as_bits, as_float, store_uint32
from quantport_cpu.jit.simd import F32, I8, I32, I64, Simd, Value, inline

LANES = 64
DIGIT_ZERO = 0x808080  # an activation of zero: 128 in each of its three base-256 digits
# The largest magnitude as an integer; the margin keeps the rounding inside three digits.
_FULL_SCALE = np.float32(2.0**22 * 0.98)
_LEAST_MAXIMUM = np.float32(2.0**-100)


@inline(types.int64)
def largest_fp32_bits(simd: Simd, x: Value, count: Value) -> Value:
    """Largest magnitude of ``count`` fp32, a multiple of 64, as bits. NaN and Inf are larger than numbers."""
    (best,) = simd.variables(simd.splat(0, LANES, I32), 1)
    with simd.steps(count, LANES) as i:
        v = simd.load(I32, LANES, simd.at(x, simd.b.mul(i, I64(4))))
        simd.b.store(simd.intrinsic("umax", simd.b.load(best), simd.int_op("and_", v, 0x7FFFFFFF)), best)
    return simd.b.zext(simd.reduce_lanes(simd.b.load(best), "umax"), I64)


@inline(types.void)
def split_digits(simd: Simd, x: Value, to: Value, count: Value, inverse: Value) -> None:
    """Splits fp32 into three planes of ``count`` digits each, the low ones first.

    Digits are s8. Adding 1.5 * 2**23 (bits
    0x4B400000) to a magnitude below 2**22 lands in [2**23, 2**24), where fp32 holds integers only.
    """
    with simd.steps(count, LANES) as i:
        v = simd.load(F32, LANES, simd.at(x, simd.b.mul(i, I64(4))))
        v = simd.b.fadd(simd.b.fmul(v, simd.splat(inverse, LANES)), simd.splat(1.5 * 2.0**23, LANES, F32))
        number = simd.int_op("add", simd.bitcast(v, I32), DIGIT_ZERO - 0x4B400000)
        for d in range(3):
            digit = simd.narrow(simd.int_op("lshr", number, 8 * d) if d else number, I8)
            digit = simd.int_op("xor", digit, -128)
            simd.store(digit, simd.at(simd.at(to, i), simd.b.mul(count, I64(d))))


@njit(error_model="numpy")
def split_row(x, to, count, scales, index):
    """Splits a row of fp32, see ``split_digits``; the scale of the lowest digit becomes ``scales[index]``."""
    top = as_float(largest_fp32_bits(x, count))
    scale = (_LEAST_MAXIMUM if top < _LEAST_MAXIMUM else top) / _FULL_SCALE
    store_uint32(scales, index, as_bits(scale))
    split_digits(x, to, count, np.float32(1.0) / scale)
