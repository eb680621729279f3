"""Encodes BF16 as small floats and code books, and their block scales: the parts of the block quantizers.

Arguments that choose the code are literals: intrinsics take them as such, and compiled functions pass them on
with ``literally``. So a kernel needs nothing but integers in its closure, which are part of its key on disk.
"""

from __future__ import annotations

import numpy as np
from numba import literally, njit
from numba.core import types

from quantport_cpu.jit.elements import ELEMENTS, Element, element_of
from quantport_cpu.jit.encode import SAFE_SCALES, quotient
from quantport_cpu.jit.scalars import as_bits, as_float
from quantport_cpu.jit.simd import F32, I8, I16, I32, I64, Simd, Value, inline

MULTIPLY, NEWTON, DIVIDE = 0, 1, 2


def _rounding(simd: Simd, x: Value, element: Element) -> tuple[Value, Value, Value]:
    """The magnitude of x, saturated; its power of two; and the bits of the fp32 that rounds it when added.

    The power is at least that of the smallest normal. Adding 2**(e + 23 - m) rounds to steps of 2**(e - m),
    to nearest even, in the low bits of the sum.
    """
    exponent, mantissa = element.exponent, element.mantissa
    lanes = x.type.count
    a = simd.intrinsic("minnum", simd.intrinsic("fabs", x), simd.splat(element.high, lanes, F32))
    power = simd.int_op("and_", simd.bitcast(a, I32), 0x7F800000)
    power = simd.intrinsic("umax", power, simd.splat(_least_exponent(exponent) << 23, lanes, I32))
    return a, power, simd.int_op("add", power, (23 - mantissa) << 23)


def _least_exponent(exponent: int) -> int:
    """The exponent of the smallest normal, with the bias of fp32, by the exponent bits of a format."""
    return 129 - (1 << exponent - 1)


def encode_minifloat(simd: Simd, x: Value, element: Element) -> Value:
    """fp32 to the codes of a small float, in int32 lanes."""
    exponent, mantissa = element.exponent, element.mantissa
    a, power, magic = _rounding(simd, x, element)
    steps = simd.b.sub(simd.bitcast(simd.b.fadd(a, simd.bitcast(magic, F32)), I32), magic)
    power = simd.int_op("lshr", power, 23 - mantissa)
    power = simd.int_op("sub", power, _least_exponent(exponent) << mantissa)
    sign = simd.int_op("lshr", simd.bitcast(x, I32), 32 - element.bits)
    sign = simd.int_op("and_", sign, 1 << (element.bits - 1))
    return simd.b.or_(simd.b.add(steps, power), sign)


def round_to_minifloat(simd: Simd, x: Value, element: Element) -> Value:
    """fp32 rounded to the values of a small float."""
    a, _, magic = _rounding(simd, x, element)
    magic = simd.bitcast(magic, F32)
    return simd.intrinsic("copysign", simd.b.fsub(simd.b.fadd(a, magic), magic), x)


def encode_codebook(simd: Simd, x: Value, element: Element) -> Value:
    """fp32 to the codes of a code book: every midpoint below x turns one code into the next."""
    codes = element.codes
    lanes = x.type.count
    out, none = simd.splat(codes[0], lanes, I32), simd.splat(0, lanes, I32)
    for i, midpoint in enumerate(element.midpoints):
        passed = simd.b.fcmp_ordered(">", x, simd.splat(midpoint, lanes, F32))
        out = simd.b.xor(out, simd.b.select(passed, simd.splat(codes[i] ^ codes[i + 1], lanes, I32), none))
    return out


def pack_codes(simd: Simd, codes: Value, bits: int) -> Value:
    """Packs codes in int32 lanes to bytes, the first in the lowest bits.

    Two codes of 4 bits make a byte, four of 6 bits make three.
    """
    codes = simd.narrow(codes, I8)
    lanes = codes.type.count
    if bits == 8:
        return codes
    if bits == 4:
        pairs = simd.bitcast(codes, I16, lanes // 2)
        return simd.narrow(simd.b.or_(pairs, simd.int_op("lshr", pairs, 4)), I8)
    fours = simd.bitcast(codes, I32, lanes // 4)
    parts = [simd.int_op("and_", simd.int_op("lshr", fours, 2 * i), 63 << 6 * i) for i in range(4)]
    joined = simd.b.or_(simd.b.or_(parts[0], parts[1]), simd.b.or_(parts[2], parts[3]))
    joined = simd.bitcast(joined, I8, lanes)
    return simd.shuffle(joined, joined, [i for i in range(lanes) if i % 4 < 3])


@inline(types.void, 5, 6, 7)
def encode_values(
    simd: Simd,
    source: Value,
    to: Value,
    count: Value,
    scale: Value,
    inverse: Value,
    n_format: int,
    n_lanes: int,
    method: int,
) -> None:
    """Codes of ``count`` bf16 over a scale; ``count`` is a multiple of ``n_lanes``.

    By ``method`` it multiplies with ``inverse``, which is exact for a power of two; corrects that by a step
    of Newton; or divides.
    """
    element = element_of(n_format)
    scales, inverses = simd.splat(scale, n_lanes), simd.splat(inverse, n_lanes)
    with simd.steps(count, n_lanes) as i:
        x = simd.load_bf16(n_lanes, simd.at(source, simd.b.mul(i, I64(2))))
        if method == MULTIPLY:
            q = simd.b.fmul(x, inverses)
        else:
            q = quotient(simd, x, scales, inverses, method == DIVIDE)
        if not element.codebook:  # the sign of a quotient that underflows
            q = simd.intrinsic("copysign", q, x)
        codes = encode_codebook(simd, q, element) if element.codebook else encode_minifloat(simd, q, element)
        packed = pack_codes(simd, codes, element.bits)
        simd.store(packed, simd.at(to, simd.b.lshr(simd.b.mul(i, I64(element.bits)), I64(3))))


@inline(types.int64)
def e4m3_code(simd: Simd, value: Value) -> Value:
    """The e4m3fn code of an fp32 that is not NaN."""
    codes = encode_minifloat(simd, simd.splat(value, 4), ELEMENTS["e4m3fn"])
    return simd.b.zext(simd.b.extract_element(codes, I32(0)), I64)


@njit(error_model="numpy")
def e4m3_value(code):
    """fp32 value of a positive e4m3fn code."""
    if code < 8:
        return np.float32(code) * np.float32(2.0**-9)
    return as_float(((code >> 3) + 120 << 23) | ((code & 7) << 20))


@njit(error_model="numpy")
def e8m0_value(exponent):
    """fp32 value of an e8m0 code below 255."""
    return as_float(exponent << 23) if exponent > 0 else as_float(1 << 22)


@njit(error_model="numpy")
def e8m0_code(bits, add, emax, high):
    """e8m0 code of a largest magnitude, given as fp32 bits; the rest is of the rule, see ``e8m0_rule``."""
    if bits >= 0x7F800000:
        return 255
    if high > np.float32(0):
        bits = as_bits(as_float(bits) / high)
        if bits <= 1 << 22:  # up to 2**-127, the smallest scale
            return 0
        return min(254 - emax, (bits + add) >> 23)
    return min(254 - emax, max(0, ((bits + add) >> 23) - emax))


@njit(error_model="numpy")
def e4m3_scale_code(value):
    """e4m3fn code of a block scale; NaN stays NaN, and 0 becomes 0.125."""
    if value != value:
        return 127
    code = e4m3_code(value)
    return code if code > 0 else 0x20


@njit(error_model="numpy")
def fp32_scale(bits, half_range):
    """fp32 scale of a largest magnitude; 0 becomes 2**-23."""
    scale = as_float(bits) / half_range
    return scale if scale != np.float32(0) else np.float32(2.0**-23)


@njit(error_model="numpy")
def encode_divided(source, to, count, scale, n_format, n_lanes):
    """Codes of ``count`` bf16 over an fp32 scale, by quotients that are correctly rounded."""
    n_format, n_lanes = literally(n_format), literally(n_lanes)
    inverse = np.float32(1.0) / scale
    if SAFE_SCALES[0] < scale < SAFE_SCALES[1]:
        encode_values(source, to, count, scale, inverse, n_format, n_lanes, NEWTON)
    else:
        encode_values(source, to, count, scale, inverse, n_format, n_lanes, DIVIDE)


@njit(error_model="numpy")
def encode_by_power(source, to, count, exponent, n_format, n_lanes):
    """Codes of ``count`` bf16 over a power of two, given as its e8m0 code."""
    inverse = e8m0_value(254 - min(exponent, 254))
    encode_values(source, to, count, inverse, inverse, literally(n_format), literally(n_lanes), MULTIPLY)
