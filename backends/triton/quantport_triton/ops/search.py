"""Searches scales with the least squared error, in the arithmetic and order of ``quantport.numerics.search``.

Sums add halves pairwise, as there, so that the same candidate wins, bit for bit. The kernels that use them
are compiled without fused multiply-add.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantport_triton.ops.encode import (
    INFINITY,
    divide,
    e4m3fn_value,
    e8m0_inverse,
    e8m0_scale,
    e8m0_value,
    magnitude_bits,
    rounded_magnitude,
)

NAN = tl.constexpr(float("nan"))
MAX_CODE = tl.constexpr(15.0)
CLIP = tl.constexpr(0.8)


@triton.jit
def sum_last(x, LOG2: tl.constexpr):
    """Sums over the last of three dimensions, of ``2**LOG2`` elements, by adding halves until one is left."""
    for i in tl.static_range(LOG2):
        halves = tl.reshape(x, (x.shape[0], x.shape[1], 2, 1 << (LOG2 - 1 - i)))
        lower, upper = tl.split(tl.permute(halves, (0, 1, 3, 2)))
        x = lower + upper
    return tl.reshape(x, (x.shape[0], x.shape[1]))


@triton.jit
def try_scale(
    value, first, factor, best, kept, step, FORMAT: tl.constexpr, SCALE: tl.constexpr, LOG2: tl.constexpr
):
    """Tries the scale ``step`` codes above ``first``; returns the best error and code so far ``[BR, BG]``."""
    if SCALE == "e8m0":
        code = tl.minimum(tl.maximum(first + step, 0), 254)
        divisor = e8m0_value(code)[:, :, None]
        ratio = value * e8m0_inverse(code)[:, :, None]
    else:
        code = tl.minimum(tl.maximum(first + step, 1), 126)
        divisor = tl.div_rn(e4m3fn_value(code), factor)[:, :, None]
        ratio = divide(value, divisor)
    error = tl.abs(value) - rounded_magnitude(ratio, FORMAT) * divisor
    total = sum_last(error * error, LOG2)
    better = total < best
    return tl.where(better, total, best), tl.where(better, code, kept)


@triton.jit
def best_scale(value, first, factor, FORMAT: tl.constexpr, SCALE: tl.constexpr, LOG2: tl.constexpr):
    """The best among the neighbours of the scales that the rule gives: codes ``[BR, BG]``, and divisors as
    those of ``scale_and_divisor``.

    Args:
        value: fp32 ``[BR, BG, 2**LOG2]``.
        first: Codes of the scales that the rule gives, int32 ``[BR, BG]``.
        factor: Global factor of e4m3fn scales.
        FORMAT: Format of the elements.
        SCALE: ``e8m0`` or ``e4m3fn``.
        LOG2: Binary logarithm of the group size.
    """
    best, kept = tl.full(first.shape, float("inf"), tl.float32), first
    # Steps 0, -1, 1, -2, 2, -3, 3, 4, 5, 6, of which e8m0 has the first three; the first of equals wins.
    for i in tl.static_range(3 if SCALE == "e8m0" else 10):
        step = (i // 2 if i % 2 == 0 else -((i + 1) // 2)) if i < 7 else i - 3
        best, kept = try_scale(value, first, factor, best, kept, step, FORMAT, SCALE, LOG2)
    if SCALE == "e8m0":
        kept = tl.where(first == 255, first, kept)
        divisor = e8m0_inverse(kept)
    else:
        kept = tl.where(first == 127, first, kept)
        divisor = tl.div_rn(e4m3fn_value(kept), factor)
    return kept, divisor


@triton.jit
def best_outer_scale(
    wide, first, FORMAT: tl.constexpr, HALF_RANGE: tl.constexpr, GROUP: tl.constexpr, LOG2: tl.constexpr
):
    """The best outer scales ``[BR, COUNT]`` of ``[BR, COUNT, 2**LOG2]``: eight candidates, from ``first``
    down in steps of an eighth of an octave.
    """
    BR: tl.constexpr = wide.shape[0]
    COUNT: tl.constexpr = wide.shape[1]
    best, kept = tl.full(first.shape, float("inf"), tl.float32), first
    for i in tl.static_range(8):
        candidate = first * 2.0 ** (-i / 8)
        inner = tl.reshape(tl.div_rn(wide, candidate[:, :, None]), (BR, (COUNT << LOG2) // GROUP, GROUP))
        code = e8m0_scale(tl.max(magnitude_bits(inner), 2), HALF_RANGE, 1 << 21, 2)
        value = (
            rounded_magnitude(inner * e8m0_inverse(code)[:, :, None], FORMAT) * e8m0_value(code)[:, :, None]
        )
        error = tl.abs(wide) - tl.reshape(value, wide.shape) * candidate[:, :, None]
        total = sum_last(error * error, LOG2)
        kept = tl.where(total < best, candidate, kept)
        best = tl.minimum(total, best)
    return kept


@triton.jit
def try_line(x, sx, start, step, best, scale, zero, LOG2: tl.constexpr):
    """Rounds ``x`` to the grid ``start + step * code`` and fits a line through the codes by least squares.

    Returns:
        The explained sum of squares, scale and offset of that line or of the best so far, whichever explains
        more: each ``[BR, BG]``.
    """
    q = (x - start[:, :, None]) * tl.div_rn(1.0, step)[:, :, None]
    q = tl.maximum(
        tl.minimum(q, MAX_CODE, propagate_nan=tl.PropagateNan.ALL), 0.0, propagate_nan=tl.PropagateNan.ALL
    )
    q = (q + 12582912.0) - 12582912.0
    INVERSE: tl.constexpr = 0.5**LOG2
    sq = sum_last(q, LOG2)
    covariance = sum_last(q * x, LOG2) - sq * sx * INVERSE
    variance = sum_last(q * q, LOG2) - sq * sq * INVERSE
    slope = tl.div_rn(covariance, variance)
    explained = covariance * slope
    better = (explained > best) & (explained < float("inf"))
    intercept = (sx - slope * sq) * INVERSE
    return (
        tl.where(better, explained, best),
        tl.where(better, slope, scale),
        tl.where(better, intercept, zero),
    )


@triton.jit
def least_squares(x, LOG2: tl.constexpr):
    """Unrounded scale and offset of groups ``[BR, BG, 2**LOG2]``: value = code * scale + offset, with codes
    from 0 to 15.
    """
    bad = tl.max(magnitude_bits(x), 2) >= INFINITY
    low = tl.where(bad, NAN, tl.min(x, 2))
    high = tl.where(bad, NAN, tl.max(x, 2))
    middle, reach = low * 0.5 + high * 0.5, high * 0.5 - low * 0.5
    x = x - middle[:, :, None]
    sx = sum_last(x, LOG2)
    part = tl.div_rn(reach, MAX_CODE)
    best, scale, zero = tl.zeros(low.shape, tl.float32), part * 2.0, -reach
    for i in tl.static_range(9):
        down, up = 1 - (i // 3) * CLIP / MAX_CODE, 1 - (i % 3) * CLIP / MAX_CODE
        best, scale, zero = try_line(x, sx, -reach * down, part * (down + up), best, scale, zero, LOG2)
    best, scale, zero = try_line(x, sx, zero, scale, best, scale, zero, LOG2)
    return scale, zero + middle
