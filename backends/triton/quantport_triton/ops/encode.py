"""Encodes fp32 values to stored codes and scales in registers: the inverse of ``decode``, bit for bit.

It uses integers and fp32 only, so that it compiles alike from Volta to Blackwell. To round to a step, a power
of two is added whose last mantissa bit is that step: fp32 rounds the sum to nearest even. Magnitudes are
compared as their bits in int32, which are in the order of the values, with NaN above all, so that a maximum
keeps a NaN. Divisions are correctly rounded (``div_rn``); before Triton 3.6 it flushes subnormal numbers to
0, so that a block with a scale below 2**-126 gets the scale of zeros. Where a scale is NaN, its codes mean
nothing. The kernels are compiled without fused multiply-add (``Config.fusion``), so that every product is
rounded.

The formats and rules are in ``docs/numerics.md``.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(0x7F800000)  # bits of fp32
SMALLEST_NORMAL = tl.constexpr(0x00800000)  # bits of 2**-126
EPS = tl.constexpr(2.0**-23)
EPS_E4M3FN = tl.constexpr(0x20)  # code of 0.125
# Midpoints of neighbouring values. FP4 never uses its second zero and has one less: its last is repeated.
NF4_MIDPOINTS = tl.constexpr(
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
FP4_MIDPOINTS = tl.constexpr(
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
# Codes of FP4 in the order of their values, the lowest in the lowest bits: the lower and the upper eight.
FP4_LOW_CODES = tl.constexpr(0x09EFCDAB)
FP4_HIGH_CODES = tl.constexpr(0x33254761)


@triton.jit
def load_fp32(x, place, inside):
    """Loads the values at ``x + place`` as fp32; 0 where not ``inside``. bf16 is the upper half of fp32."""
    if x.dtype.element_ty == tl.bfloat16:
        bits = tl.load(x.to(tl.pointer_type(tl.int16), bitcast=True) + place, mask=inside, other=0)
        value = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(x + place, mask=inside, other=0).to(tl.float32)
    return value


@triton.jit
def magnitude_bits(x):
    """Bits of ``abs(x)``."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def bf16_bits(x):
    """Rounds fp32 to bf16: int32, the bits of the result as fp32. NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    nearest = bits + 0x7FFF + ((bits >> 16) & 1)
    return tl.where(magnitude_bits(x) > INFINITY, 0x7FC00000, nearest & -65536)


@triton.jit
def round_as(x, like):
    """Rounds fp32 to the dtype that the pointer ``like`` points to; the result is fp32."""
    if like.dtype.element_ty == tl.bfloat16:
        value = bf16_bits(x).to(tl.float32, bitcast=True)
    else:
        value = x.to(like.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def rounding(a, SHIFT: tl.constexpr, SMALLEST: tl.constexpr):
    """The number that rounds a magnitude to a small float when it is added: bits of ``2**(e + SHIFT)``, and
    those of ``2**e``.

    ``e`` is the exponent of ``a``, at least ``SMALLEST``, the exponent of the smallest normal number of the
    format. ``SHIFT`` is 23 minus its mantissa bits, so that the last mantissa bit of ``2**(e + SHIFT)`` is
    the step of the format at ``a``.
    """
    exponent = tl.maximum(a.to(tl.int32, bitcast=True), (SMALLEST + 127) << 23) & INFINITY
    return exponent + (SHIFT << 23), exponent


@triton.jit
def encode_small_float(
    x, sign_of, SHIFT: tl.constexpr, SMALLEST: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr
):
    """Encodes to a small float, saturating, with the sign of ``sign_of``.

    Exponent and mantissa count up as one number, so that a mantissa that rounds up carries into the exponent.
    """
    a = tl.minimum(tl.abs(x), HIGH)
    magic, exponent = rounding(a, SHIFT, SMALLEST)
    steps = (a + magic.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - magic
    code = steps + ((exponent - ((SMALLEST + 127) << 23)) >> SHIFT)
    return code | (sign_of.to(tl.int32, bitcast=True) >> (32 - BITS)) & (1 << (BITS - 1))


@triton.jit
def round_small_float(x, SHIFT: tl.constexpr, SMALLEST: tl.constexpr, HIGH: tl.constexpr):
    """Rounds to a small float, saturating: the magnitude, fp32."""
    a = tl.minimum(tl.abs(x), HIGH)
    magic, _exponent = rounding(a, SHIFT, SMALLEST)
    wide = magic.to(tl.float32, bitcast=True)
    return (a + wide) - wide


@triton.jit
def rounded_magnitude(x, FORMAT: tl.constexpr):
    """Rounds to a format that is a small float, saturating: the magnitude, fp32."""
    if FORMAT == "e4m3fn":
        value = round_small_float(x, 20, -6, 448.0)
    elif FORMAT == "e2m3":
        value = round_small_float(x, 20, 0, 7.5)
    elif FORMAT == "e3m2":
        value = round_small_float(x, 21, -2, 28.0)
    else:
        tl.static_assert(FORMAT == "e2m1")
        value = round_small_float(x, 22, 0, 6.0)
    return value


@triton.jit
def rank(x, MIDPOINTS: tl.constexpr):
    """Counts how many of 15 ascending midpoints are below ``x``, by bisection."""
    a = x > MIDPOINTS[7]
    b = x > tl.where(a, MIDPOINTS[11], MIDPOINTS[3])
    c = x > tl.where(a, tl.where(b, MIDPOINTS[13], MIDPOINTS[9]), tl.where(b, MIDPOINTS[5], MIDPOINTS[1]))
    upper = tl.where(b, tl.where(c, MIDPOINTS[14], MIDPOINTS[12]), tl.where(c, MIDPOINTS[10], MIDPOINTS[8]))
    lower = tl.where(b, tl.where(c, MIDPOINTS[6], MIDPOINTS[4]), tl.where(c, MIDPOINTS[2], MIDPOINTS[0]))
    d = x > tl.where(a, upper, lower)
    return a.to(tl.int32) * 8 + b.to(tl.int32) * 4 + c.to(tl.int32) * 2 + d.to(tl.int32)


@triton.jit
def encode(x, sign_of, FORMAT: tl.constexpr):
    """Encodes values that are already divided by their scale: int32.

    The sign of a small float is that of ``sign_of``. int8 is in two's complement, int4 is code + 8.
    """
    if FORMAT == "e4m3fn":
        code = encode_small_float(x, sign_of, 20, -6, 8, 448.0)
    elif FORMAT == "e2m3":
        code = encode_small_float(x, sign_of, 20, 0, 6, 7.5)
    elif FORMAT == "e3m2":
        code = encode_small_float(x, sign_of, 21, -2, 6, 28.0)
    elif FORMAT == "e2m1":
        code = encode_small_float(x, sign_of, 22, 0, 4, 6.0)
    elif FORMAT == "int8":  # 1.5 * 2**23 has steps of 1
        code = (tl.minimum(tl.maximum(x, -128.0), 127.0) + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    elif FORMAT == "int4":
        code = (tl.minimum(tl.maximum(x, -8.0), 7.0) + 12582912.0).to(tl.int32, bitcast=True) - 0x4B3FFFF8
    elif FORMAT == "nf4":
        code = rank(x, NF4_MIDPOINTS)
    else:
        tl.static_assert(FORMAT == "fp4")
        place = rank(x, FP4_MIDPOINTS)
        code = tl.where(place < 8, FP4_LOW_CODES, FP4_HIGH_CODES) >> (place & 7) * 4 & 15
    return code


@triton.jit
def e8m0_scale(amax, HIGH: tl.constexpr, ROUNDING: tl.constexpr, EMAX: tl.constexpr):
    """Biased exponents of power-of-two scales, int32.

    Args:
        amax: Bits of the largest magnitudes.
        HIGH: Largest value of the elements.
        ROUNDING: What the rule adds to the bits before it takes the exponent; -1 for ``rceil``.
        EMAX: Exponent of ``HIGH``, which stays finite with the largest scale, ``2**(127 - EMAX)``.
    """
    if ROUNDING == -1:
        ratio = tl.div_rn(amax.to(tl.float32, bitcast=True), HIGH).to(tl.int32, bitcast=True)
        exponent = tl.where(ratio <= 1 << 22, 0, (ratio + 0x7FFFFF) >> 23)
    else:
        exponent = tl.maximum(((amax + ROUNDING) >> 23) - EMAX, 0)
    return tl.where(amax >= INFINITY, 255, tl.minimum(exponent, 254 - EMAX))


@triton.jit
def e8m0_value(code):
    """Value of an e8m0 scale."""
    bits = tl.where(code == 0, 0x400000, code << 23)
    return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_inverse(code):
    """``1 / power(code)``, which is exact; NaN for NaN."""
    bits = tl.where(code == 254, 0x400000, (254 - code) << 23)
    return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e4m3fn_scale(x):
    """Encodes nonnegative scales in e4m3fn: int32; 0 becomes 0.125."""
    code = tl.where(magnitude_bits(x) > INFINITY, 127, encode_small_float(x, x, 20, -6, 8, 448.0))
    return tl.where(code == 0, EPS_E4M3FN, code)


@triton.jit
def e4m3fn_value(code):
    """Decodes nonnegative codes of e4m3fn."""
    value = (code << 20).to(tl.float32, bitcast=True) * (2.0**120)
    return tl.where(code == 127, float("nan"), value)


@triton.jit
def scale_and_divisor(
    amax, SCALE: tl.constexpr, HALF_RANGE: tl.constexpr, ROUNDING: tl.constexpr, EMAX: tl.constexpr
):
    """Scales of blocks with one level of scales.

    Args:
        amax: Bits of the largest magnitudes.
        SCALE: ``fp32``, ``bf16``, ``e4m3fn`` or ``e8m0``.
        HALF_RANGE: Half the range of the elements.
        ROUNDING: As for ``e8m0_scale``.
        EMAX: As for ``e8m0_scale``.

    Returns:
        The scale as stored, int32 or fp32, and the divisor of the values; for e8m0 their multiplier.
    """
    if SCALE == "e8m0":
        stored = e8m0_scale(amax, HALF_RANGE, ROUNDING, EMAX)
        divisor = e8m0_inverse(stored)
    else:
        stored = tl.div_rn(amax.to(tl.float32, bitcast=True), HALF_RANGE)
        if SCALE == "e4m3fn":
            stored = e4m3fn_scale(stored)
            divisor = e4m3fn_value(stored)
        elif SCALE == "bf16":
            bits = bf16_bits(stored)
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
    """``x / divisor`` rounded to nearest even, in six instructions for each x.

    Two refinement steps from the correctly rounded reciprocal. Source: Markstein, "Computation of elementary
    functions on the IBM RISC System/6000 processor", 1990. Residuals are exact as long as nothing underflows,
    so both operands are scaled away from the limits of fp32. Quotients below 2**-12 may be wrong in their
    last bit, and a quotient of zero has no sign: no code depends on either.

    Args:
        x: Values.
        divisor: Not negative, broadcastable with ``x``; what concerns it alone is computed once for each
            divisor.
    """
    away = tl.where(divisor < 2.0**-80, 2.0**80, tl.where(divisor > 2.0**80, 2.0**-80, 1.0))
    s = divisor * away
    reciprocal = tl.div_rn(1.0, s)
    a = x * away
    q = a * reciprocal
    q = tl.fma(tl.fma(q, -s, a), reciprocal, q)
    return tl.fma(tl.fma(q, -s, a), reciprocal, q)


@triton.jit
def divide_and_encode(x, divisor, FORMAT: tl.constexpr, SCALE: tl.constexpr):
    """Divides values by the divisor that ``scale_and_divisor`` returned, and encodes them."""
    return encode(x * divisor if SCALE == "e8m0" else divide(x, divisor), x, FORMAT)
