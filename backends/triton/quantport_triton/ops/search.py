"""Scales that are searched for: least squared error, in the arithmetic and the order of
``quantport.numerics.search``.

Sums are folds of halves, as there, so that the same candidate wins for the same bits. What depends on them is
compiled without fused multiply-add.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantport_triton.ops.encode import (
    INFINITE,
    divide,
    e4m3fn_value,
    e8m0,
    inverse,
    magnitude,
    nearest,
    power,
)

NAN = tl.constexpr(float("nan"))
TOP = tl.constexpr(15.0)
CLIP = tl.constexpr(0.8)


@triton.jit
def fold(x, LOG: tl.constexpr):
    """Sum over the last of three dimensions, of ``2**LOG`` elements: halves are added until one is left."""
    for i in tl.static_range(LOG):
        halves = tl.reshape(x, (x.shape[0], x.shape[1], 2, 1 << (LOG - 1 - i)))
        lower, upper = tl.split(tl.permute(halves, (0, 1, 3, 2)))
        x = lower + upper
    return tl.reshape(x, (x.shape[0], x.shape[1]))


@triton.jit
def neighbour(
    value, first, factor, best, kept, step, FORMAT: tl.constexpr, SCALE: tl.constexpr, LOG: tl.constexpr
):
    """Tries the scale ``step`` codes above the first: the new best error and code, ``[BR, BG]``."""
    if SCALE == "e8m0":
        code = tl.minimum(tl.maximum(first + step, 0), 254)
        divisor = power(code)[:, :, None]
        ratio = value * inverse(code)[:, :, None]
    else:
        code = tl.minimum(tl.maximum(first + step, 1), 126)
        divisor = tl.div_rn(e4m3fn_value(code), factor)[:, :, None]
        ratio = divide(value, divisor)
    error = tl.abs(value) - nearest(ratio, FORMAT) * divisor
    total = fold(error * error, LOG)
    better = total < best
    return tl.where(better, total, best), tl.where(better, code, kept)


@triton.jit
def neighbours(value, first, factor, FORMAT: tl.constexpr, SCALE: tl.constexpr, LOG: tl.constexpr):
    """Best of the neighbours of the scales of the rule: codes ``[BR, BG]``, and divisors as ``scale_of``
    gives them.

    Args:
        value: fp32 ``[BR, BG, 2**LOG]``.
        first: Codes, int32.
        factor: Global factor of e4m3fn scales.
    """
    best, kept = tl.full(first.shape, float("inf"), tl.float32), first
    for i in tl.static_range(
        3 if SCALE == "e8m0" else 10
    ):  # 0, -1, 1, -2, 2, -3, 3, 4, 5, 6: of equal ones the first wins
        step = (i // 2 if i % 2 == 0 else -((i + 1) // 2)) if i < 7 else i - 3
        best, kept = neighbour(value, first, factor, best, kept, step, FORMAT, SCALE, LOG)
    if SCALE == "e8m0":
        kept = tl.where(first == 255, first, kept)
        divisor = inverse(kept)
    else:
        kept = tl.where(first == 127, first, kept)
        divisor = tl.div_rn(e4m3fn_value(kept), factor)
    return kept, divisor


@triton.jit
def outer(wide, first, FORMAT: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, LOG: tl.constexpr):
    """Best outer scales ``[BR, COUNT]`` of ``[BR, COUNT, 2**LOG]``: an octave in eighths, from ``first``
    down.
    """
    BR: tl.constexpr = wide.shape[0]
    COUNT: tl.constexpr = wide.shape[1]
    best, kept = tl.full(first.shape, float("inf"), tl.float32), first
    for i in tl.static_range(8):
        candidate = first * 2.0 ** (-i / 8)
        inner = tl.reshape(tl.div_rn(wide, candidate[:, :, None]), (BR, (COUNT << LOG) // GROUP, GROUP))
        code = e8m0(tl.max(magnitude(inner), 2), HALF, 1 << 21, 2)
        value = nearest(inner * inverse(code)[:, :, None], FORMAT) * power(code)[:, :, None]
        error = tl.abs(wide) - tl.reshape(value, wide.shape) * candidate[:, :, None]
        total = fold(error * error, LOG)
        kept = tl.where(total < best, candidate, kept)
        best = tl.minimum(total, best)
    return kept


@triton.jit
def fit(x, sx, start, step, best, scale, zero, LOG: tl.constexpr):
    """Codes of ``x`` on a grid, and the line through them: the better of it and what is kept, ``[BR,
    BG]``.
    """
    q = (x - start[:, :, None]) * tl.div_rn(1.0, step)[:, :, None]
    q = tl.maximum(
        tl.minimum(q, TOP, propagate_nan=tl.PropagateNan.ALL), 0.0, propagate_nan=tl.PropagateNan.ALL
    )
    q = (q + 12582912.0) - 12582912.0
    INVERSE: tl.constexpr = 0.5**LOG
    sq = fold(q, LOG)
    covariance = fold(q * x, LOG) - sq * sx * INVERSE
    variance = fold(q * q, LOG) - sq * sq * INVERSE
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
def least_squares(x, LOG: tl.constexpr):
    """Scale and offset, unrounded, of blocks ``[BR, BG, 2**LOG]``: value = code * scale + offset, codes from
    0 to 15.
    """
    bad = tl.max(magnitude(x), 2) >= INFINITE
    low = tl.where(bad, NAN, tl.min(x, 2))
    high = tl.where(bad, NAN, tl.max(x, 2))
    middle, reach = low * 0.5 + high * 0.5, high * 0.5 - low * 0.5
    x = x - middle[:, :, None]
    sx = fold(x, LOG)
    part = tl.div_rn(reach, TOP)
    best, scale, zero = tl.zeros(low.shape, tl.float32), part * 2.0, -reach
    for i in tl.static_range(9):
        down, up = 1 - (i // 3) * CLIP / TOP, 1 - (i % 3) * CLIP / TOP
        best, scale, zero = fit(x, sx, -reach * down, part * (down + up), best, scale, zero, LOG)
    best, scale, zero = fit(x, sx, zero, scale, best, scale, zero, LOG)
    return scale, zero + middle
