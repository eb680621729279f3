"""BF16 to the codes of small floats and code books, and their block scales: what the quantizers of blocks are
made of.

Arguments that choose the code are literals: intrinsics take them as such, and compiled functions pass them on
with ``literally``. So a kernel needs nothing but integers in its closure, which are part of its key on disk.
"""

from __future__ import annotations

import numpy as np
from numba import literally, njit
from numba.core import types

from quantport_cpu.jit.elements import ELEMENTS, Element, element_of
from quantport_cpu.jit.emit import F32, I8, I16, I32, I64, Simd, Value, inline
from quantport_cpu.jit.encode import SAFE, bits32, f32, quotient

MULTIPLY, NEWTON, DIVIDE = 0, 1, 2


def floats(simd: Simd, source: Value, lanes: int) -> Value:
    """``lanes`` bf16 at an address, as fp32."""
    return simd.bits(simd.integer("shl", simd.widen(simd.load(I16, lanes, source), I32), 16), F32)


def _magic(simd: Simd, x: Value, element: Element) -> tuple[Value, Value, Value]:
    """Magnitude of x, saturated; its exponent bits, at least those of the smallest normal; and what rounds it
    when added.

    Adding 2**(e + 23 - m) rounds to steps of 2**(e - m), to nearest even, in the low bits of the sum.
    """
    exponent, mantissa = element.exponent, element.mantissa
    lanes = x.type.count
    a = simd.same("minnum", simd.same("fabs", x), simd.splat(element.high, lanes, F32))
    power = simd.integer("and_", simd.bits(a, I32), 0x7F800000)
    power = simd.same("umax", power, simd.splat(_smallest(exponent) << 23, lanes, I32))
    return a, power, simd.integer("add", power, (23 - mantissa) << 23)


def _smallest(exponent: int) -> int:
    return 129 - (1 << exponent - 1)


def small(simd: Simd, x: Value, element: Element) -> Value:
    """fp32 to the codes of a small float, in int32 lanes."""
    exponent, mantissa = element.exponent, element.mantissa
    a, power, magic = _magic(simd, x, element)
    steps = simd.b.sub(simd.bits(simd.b.fadd(a, simd.bits(magic, F32)), I32), magic)
    rest = simd.integer("sub", simd.integer("lshr", power, 23 - mantissa), _smallest(exponent) << mantissa)
    sign = simd.integer(
        "and_", simd.integer("lshr", simd.bits(x, I32), 32 - element.bits), 1 << (element.bits - 1)
    )
    return simd.b.or_(simd.b.add(steps, rest), sign)


def rounded(simd: Simd, x: Value, element: Element) -> Value:
    """fp32 rounded to the values of a small float."""
    a, _, magic = _magic(simd, x, element)
    magic = simd.bits(magic, F32)
    return simd.same("copysign", simd.b.fsub(simd.b.fadd(a, magic), magic), x)


def nearest(simd: Simd, x: Value, element: Element) -> Value:
    """fp32 to indices into a code book: every midpoint that x passes turns one code into the next."""
    codes = element.codes
    lanes = x.type.count
    out, none = simd.splat(codes[0], lanes, I32), simd.splat(0, lanes, I32)
    for i, midpoint in enumerate(element.midpoints):
        passed = simd.b.fcmp_ordered(">", x, simd.splat(midpoint, lanes, F32))
        out = simd.b.xor(out, simd.b.select(passed, simd.splat(codes[i] ^ codes[i + 1], lanes, I32), none))
    return out


def pack(simd: Simd, codes: Value, bits: int) -> Value:
    """Codes in int32 lanes to bytes: two or four codes to one or three of them, the first in the
    lowest bits.
    """
    codes = simd.narrow(codes, I8)
    lanes = codes.type.count
    if bits == 8:
        return codes
    if bits == 4:
        pairs = simd.bits(codes, I16, lanes // 2)
        return simd.narrow(simd.b.or_(pairs, simd.integer("lshr", pairs, 4)), I8)
    words = simd.bits(codes, I32, lanes // 4)
    parts = [simd.integer("and_", simd.integer("lshr", words, 2 * i), 63 << 6 * i) for i in range(4)]
    joined = simd.bits(simd.b.or_(simd.b.or_(parts[0], parts[1]), simd.b.or_(parts[2], parts[3])), I8, lanes)
    return simd.shuffle(joined, joined, [i for i in range(lanes) if i % 4 < 3])


@inline(types.void, 5, 6, 7)
def codes_of(
    simd: Simd,
    source: Value,
    to: Value,
    count: Value,
    scale: Value,
    inverse: Value,
    n_format: int,
    n_lanes: int,
    how: int,
) -> None:
    """Codes of ``count`` bf16, a multiple of the lanes. ``how``: ``inverse`` is exact, or a Newton step mends
    it, or divide.
    """
    element = element_of(n_format)
    scales, inverses = simd.splat(scale, n_lanes), simd.splat(inverse, n_lanes)
    with simd.steps(count, n_lanes) as i:
        x = floats(simd, simd.at(source, simd.b.mul(i, I64(2))), n_lanes)
        q = (
            simd.b.fmul(x, inverses)
            if how == MULTIPLY
            else quotient(simd, x, scales, inverses, how == DIVIDE)
        )
        if not element.codebook:  # the sign of a quotient that underflows
            q = simd.same("copysign", q, x)
        codes = nearest(simd, q, element) if element.codebook else small(simd, q, element)
        simd.store(
            pack(simd, codes, element.bits),
            simd.at(to, simd.b.lshr(simd.b.mul(i, I64(element.bits)), I64(3))),
        )


@inline(types.int64)
def e4m3_of(simd: Simd, value: Value) -> Value:
    """One fp32 as an e4m3fn code; NaN is not looked for."""
    codes = small(simd, simd.splat(value, 4), ELEMENTS["e4m3fn"])
    return simd.b.zext(simd.b.extract_element(codes, I32(0)), I64)


@njit(error_model="numpy")
def e4m3_value(code):
    """fp32 value of a positive e4m3fn code."""
    if code < 8:
        return np.float32(code) * np.float32(2.0**-9)
    return f32(((code >> 3) + 120 << 23) | ((code & 7) << 20))


@njit(error_model="numpy")
def power_value(exponent):
    """fp32 value of an e8m0 code below 255."""
    return f32(exponent << 23) if exponent > 0 else f32(1 << 22)


@njit(error_model="numpy")
def e8m0_of(bits, add, emax, high):
    """e8m0 code of a largest magnitude, given as fp32 bits. A rule is what it adds; ``high`` is 0 but for
    ``rceil``. ``emax`` is the exponent of the largest element, which must stay finite.
    """
    if bits >= 0x7F800000:
        return 255
    if high > np.float32(0):
        bits = bits32(f32(bits) / high)
        if bits <= 1 << 22:  # up to 2**-127, the smallest scale
            return 0
        return min(254 - emax, (bits + add) >> 23)
    return min(254 - emax, max(0, ((bits + add) >> 23) - emax))


@njit(error_model="numpy")
def e4m3_scale(value):
    """e4m3fn code of a block scale; NaN stays NaN, and 0 becomes 0.125."""
    if value != value:
        return 127
    code = e4m3_of(value)
    return code if code > 0 else 0x20


@njit(error_model="numpy")
def f32_scale(bits, half_range):
    """fp32 scale of a largest magnitude; 0 becomes 2**-23."""
    scale = f32(bits) / half_range
    return scale if scale != np.float32(0) else np.float32(2.0**-23)


@njit(error_model="numpy")
def divided(source, to, count, scale, n_format, n_lanes):
    """Codes of ``count`` bf16 over an fp32 scale, as a true division gives them."""
    n_format, n_lanes = literally(n_format), literally(n_lanes)
    inverse = np.float32(1.0) / scale
    if SAFE[0] < scale < SAFE[1]:
        codes_of(source, to, count, scale, inverse, n_format, n_lanes, NEWTON)
    else:
        codes_of(source, to, count, scale, inverse, n_format, n_lanes, DIVIDE)


@njit(error_model="numpy")
def multiplied(source, to, count, exponent, n_format, n_lanes):
    """Codes of ``count`` bf16 over a power of two, given as its e8m0 code."""
    inverse = power_value(254 - min(exponent, 254))
    codes_of(source, to, count, inverse, inverse, literally(n_format), literally(n_lanes), MULTIPLY)
