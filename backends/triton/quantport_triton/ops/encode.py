"""fp32 values to stored codes and scales, in registers: the inverse of ``decode``, exact to the last bit.

Integers and fp32 only, so that it compiles alike from Volta to Blackwell: rounding is an addition of a power
of two whose last bit is the step wanted, which fp32 rounds to nearest even. Magnitudes are handled as their
bits, int32: these have the order of the values, with NaN above all, so that a maximum keeps it. Divisions are
true ones: ``div_rn``, which before Triton 3.6 takes subnormal numbers for 0, so that a block whose scale is
below 2**-126 gets that of zeros. Where a scale is NaN, its codes mean nothing. The kernels are compiled
without fused multiply-add (``Config.fusion``), so that every product is rounded.

The formats and rules: ``docs/numerics.md``.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITE = tl.constexpr(0x7F800000)
EPS = tl.constexpr(2.0**-23)
EPS_E4M3FN = tl.constexpr(0x20)  # 0.125
TINY = tl.constexpr(0x00800000)  # bits of 2**-126
# Midpoints of neighbours in fp32. FP4 has one less, for its second zero is never used: its last is repeated.
NF4 = tl.constexpr(
    (
        -0.8480963706970215,
        -0.6106328964233398,
        -0.4599952697753906,
        -0.33967941999435425,
        -0.23460739850997925,
        -0.13791173696517944,
        -0.045525018125772476,
        0.03979014977812767,
        0.120255246758461,
        0.2035212516784668,
        0.2920137643814087,
        0.3893125355243683,
        0.5016634464263916,
        0.6427869200706482,
        0.8614784479141235,
    )
)
FP4 = tl.constexpr(
    (
        -0.8333333730697632,
        -0.5833333730697632,
        -0.4166666865348816,
        -0.2916666865348816,
        -0.2083333432674408,
        -0.0859375,
        -0.0026041667442768812,
        0.0026041667442768812,
        0.0859375,
        0.2083333432674408,
        0.2916666865348816,
        0.4166666865348816,
        0.5833333730697632,
        0.8333333730697632,
        0.8333333730697632,
    )
)
FP4_LOWER, FP4_UPPER = (
    tl.constexpr(0x09EFCDAB),
    tl.constexpr(0x33254761),
)  # codes by rank, the lowest value in the lowest bits


@triton.jit
def fp32(x, place, inside):
    """Values at ``x + place`` in fp32; 0 where not ``inside``. bf16 is the upper half of fp32."""
    if x.dtype.element_ty == tl.bfloat16:
        bits = tl.load(x.to(tl.pointer_type(tl.int16), bitcast=True) + place, mask=inside, other=0)
        value = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(x + place, mask=inside, other=0).to(tl.float32)
    return value


@triton.jit
def magnitude(x):
    """Bits of ``abs(x)``."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def bf16(x):
    """fp32 rounded to bf16: the bits of an fp32 number, int32. NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    nearest = bits + 0x7FFF + ((bits >> 16) & 1)
    return tl.where(magnitude(x) > INFINITE, 0x7FC00000, nearest & -65536)


@triton.jit
def round_as(x, like):
    """fp32 rounded to the dtype that the pointer ``like`` points to, and back."""
    if like.dtype.element_ty == tl.bfloat16:
        value = bf16(x).to(tl.float32, bitcast=True)
    else:
        value = x.to(like.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def rounding(a, SHIFT: tl.constexpr, SMALLEST: tl.constexpr):
    """What rounds a magnitude to a small float when it is added: bits of ``2**(e + SHIFT)``, and those of
    ``2**e``.

    ``e`` is the exponent of ``a``, or ``SMALLEST``, that of the smallest normal number; ``SHIFT`` is 23 less
    the mantissa bits. The last bit of ``2**(e + SHIFT)`` is a step of ``a``.
    """
    exponent = tl.maximum(a.to(tl.int32, bitcast=True), (SMALLEST + 127) << 23) & INFINITE
    return exponent + (SHIFT << 23), exponent


@triton.jit
def small(x, signed, SHIFT: tl.constexpr, SMALLEST: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr):
    """Codes of a small float, saturating; with the sign of ``signed``. Steps and exponent count up
    together.
    """
    a = tl.minimum(tl.abs(x), HIGH)
    magic, exponent = rounding(a, SHIFT, SMALLEST)
    steps = (a + magic.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - magic
    code = steps + ((exponent - ((SMALLEST + 127) << 23)) >> SHIFT)
    return code | (signed.to(tl.int32, bitcast=True) >> (32 - BITS)) & (1 << (BITS - 1))


@triton.jit
def near(x, SHIFT: tl.constexpr, SMALLEST: tl.constexpr, HIGH: tl.constexpr):
    """Magnitudes of the values of what ``small`` encodes."""
    a = tl.minimum(tl.abs(x), HIGH)
    magic, _exponent = rounding(a, SHIFT, SMALLEST)
    wide = magic.to(tl.float32, bitcast=True)
    return (a + wide) - wide


@triton.jit
def nearest(x, FORMAT: tl.constexpr):
    """Magnitudes of the values of the codes of ``x``, in the formats of ``small``: fp32."""
    if FORMAT == "e4m3fn":
        value = near(x, 20, -6, 448.0)
    elif FORMAT == "e2m3":
        value = near(x, 20, 0, 7.5)
    elif FORMAT == "e3m2":
        value = near(x, 21, -2, 28.0)
    else:
        tl.static_assert(FORMAT == "e2m1")
        value = near(x, 22, 0, 6.0)
    return value


@triton.jit
def rank(x, MIDDLE: tl.constexpr):
    """How many of 15 ascending midpoints are below ``x``, by halving."""
    a = x > MIDDLE[7]
    b = x > tl.where(a, MIDDLE[11], MIDDLE[3])
    c = x > tl.where(a, tl.where(b, MIDDLE[13], MIDDLE[9]), tl.where(b, MIDDLE[5], MIDDLE[1]))
    upper = tl.where(b, tl.where(c, MIDDLE[14], MIDDLE[12]), tl.where(c, MIDDLE[10], MIDDLE[8]))
    lower = tl.where(b, tl.where(c, MIDDLE[6], MIDDLE[4]), tl.where(c, MIDDLE[2], MIDDLE[0]))
    d = x > tl.where(a, upper, lower)
    return a.to(tl.int32) * 8 + b.to(tl.int32) * 4 + c.to(tl.int32) * 2 + d.to(tl.int32)


@triton.jit
def encode(x, signed, FORMAT: tl.constexpr):
    """Codes of values that are divided by their scale: int32; the sign is that of ``signed``.

    int8 is in two's complement, int4 is code + 8.
    """
    if FORMAT == "e4m3fn":
        code = small(x, signed, 20, -6, 8, 448.0)
    elif FORMAT == "e2m3":
        code = small(x, signed, 20, 0, 6, 7.5)
    elif FORMAT == "e3m2":
        code = small(x, signed, 21, -2, 6, 28.0)
    elif FORMAT == "e2m1":
        code = small(x, signed, 22, 0, 4, 6.0)
    elif FORMAT == "int8":  # 1.5 * 2**23 has steps of 1
        code = (tl.minimum(tl.maximum(x, -128.0), 127.0) + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    elif FORMAT == "int4":
        code = (tl.minimum(tl.maximum(x, -8.0), 7.0) + 12582912.0).to(tl.int32, bitcast=True) - 0x4B3FFFF8
    elif FORMAT == "nf4":
        code = rank(x, NF4)
    else:
        tl.static_assert(FORMAT == "fp4")
        place = rank(x, FP4)
        code = tl.where(place < 8, FP4_LOWER, FP4_UPPER) >> (place & 7) * 4 & 15
    return code


@triton.jit
def e8m0(amax, HIGH: tl.constexpr, UP: tl.constexpr, EMAX: tl.constexpr):
    """Biased exponents of power-of-two scales, int32.

    Args:
        amax: Bits of the largest magnitudes.
        HIGH: Largest value of the elements.
        UP: What the rule adds to the bits before the exponent is taken; -1 for ``rceil``.
        EMAX: Exponent of ``HIGH``, which stays finite with the largest scale, ``2**(127 - EMAX)``.
    """
    if UP == -1:
        ratio = tl.div_rn(amax.to(tl.float32, bitcast=True), HIGH).to(tl.int32, bitcast=True)
        exponent = tl.where(ratio <= 1 << 22, 0, (ratio + 0x7FFFFF) >> 23)
    else:
        exponent = tl.maximum(((amax + UP) >> 23) - EMAX, 0)
    return tl.where(amax >= INFINITE, 255, tl.minimum(exponent, 254 - EMAX))


@triton.jit
def power(code):
    """Value of an e8m0 scale."""
    bits = tl.where(code == 0, 0x400000, code << 23)
    return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def inverse(code):
    """``1 / power(code)``, which is exact; NaN for NaN."""
    bits = tl.where(code == 254, 0x400000, (254 - code) << 23)
    return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e4m3fn_scale(x):
    """Codes of scales that are not negative, int32; 0 becomes 0.125."""
    code = tl.where(magnitude(x) > INFINITE, 127, small(x, x, 20, -6, 8, 448.0))
    return tl.where(code == 0, EPS_E4M3FN, code)


@triton.jit
def e4m3fn_value(code):
    """Values of codes of e4m3fn that are not negative."""
    value = (code << 20).to(tl.float32, bitcast=True) * (2.0**120)
    return tl.where(code == 127, float("nan"), value)


@triton.jit
def scale_of(amax, SCALE: tl.constexpr, HALF: tl.constexpr, UP: tl.constexpr, EMAX: tl.constexpr):
    """Scales of blocks with one level of scales.

    Args:
        amax: Bits of the largest magnitudes.
        SCALE: ``fp32``, ``bf16``, ``e4m3fn`` or ``e8m0``.
        HALF: Half the span of the elements.
        UP, EMAX: As for ``e8m0``.

    Returns:
        What is stored, int32 or fp32, and what values are divided by (of e8m0: multiplied with).
    """
    if SCALE == "e8m0":
        stored = e8m0(amax, HALF, UP, EMAX)
        divisor = inverse(stored)
    else:
        stored = tl.div_rn(amax.to(tl.float32, bitcast=True), HALF)
        if SCALE == "e4m3fn":
            stored = e4m3fn_scale(stored)
            divisor = e4m3fn_value(stored)
        elif SCALE == "bf16":
            bits = bf16(stored)
            bits = tl.where(bits == 0, 0x34000000, bits)
            stored = bits >> 16
            divisor = bits.to(tl.float32, bitcast=True)
        else:
            tl.static_assert(SCALE == "fp32")
            stored = tl.where(stored == 0, EPS, stored)
            divisor = stored
    return stored, divisor


@triton.jit
def divide(x, divisor):
    """``x / divisor`` rounded to nearest even, in six instructions for each x: two steps of refinement from
    the correctly rounded reciprocal. Source: Markstein, "Computation of elementary functions on the IBM RISC
    System/6000
        processor", 1990.

    Residuals are exact as long as nothing underflows: both operands are scaled away from the ends of
        fp32. Quotients below
    2**-12 may be off by their last bit, and have no sign when they are zero: no code depends on that.

    Args:
        x: Values.
        divisor: Not negative; of a shape that is broadcast, and computed with, before it meets ``x``.
    """
    away = tl.where(divisor < 2.0**-80, 2.0**80, tl.where(divisor > 2.0**80, 2.0**-80, 1.0))
    s = divisor * away
    reciprocal = tl.div_rn(1.0, s)
    a = x * away
    q = a * reciprocal
    q = tl.fma(tl.fma(q, -s, a), reciprocal, q)
    return tl.fma(tl.fma(q, -s, a), reciprocal, q)


@triton.jit
def codes_of(x, divisor, FORMAT: tl.constexpr, SCALE: tl.constexpr):
    """Codes of values over their scale, of which ``scale_of`` gave the divisor."""
    return encode(x * divisor if SCALE == "e8m0" else divide(x, divisor), x, FORMAT)
