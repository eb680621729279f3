"""Quantization of a matrix: every element is read once, or twice where a scale spans more than one program
can hold.

A tile is ``[BR, BG, P]``: rows, groups of a row, and elements of a group, padded to a power of two. Its
scales come from the maximum over the last dimension; its codes are packed in registers and stored as whole
words.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantport_triton.ops import search
from quantport_triton.ops.encode import (
    EPS,
    TINY,
    bf16,
    codes_of,
    e4m3fn_scale,
    e4m3fn_value,
    encode,
    fp32,
    magnitude,
    round_as,
    scale_of,
)


@triton.jit
def put_codes(
    codes,
    code,
    row,
    rows,
    start,
    K,
    units,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Stores codes ``[BR, BG, P]`` of groups that begin at columns ``start`` ``[BG]``.

    Args:
        codes: Pointer to the codes, bytes.
        code: int32; above ``BITS`` bits anything when ``BITS`` is 8, else nothing.
        row: int64 ``[BR]``; those from ``rows`` on do not exist.
        start: Columns, of words of 4 or 6 bits.
        K: Columns.
        units: Words of ``BYTES`` bytes (1, 3 or 4) of a row; used below 8 bits.
        GROUP: Columns of a group, a multiple of those of a word.
        EVEN: Whether K is a multiple of the codes of a word; if not, the last word is filled with zeros.
    """
    inner = tl.arange(0, code.shape[2])[None, :]
    there = (row < rows)[:, None, None]
    if BITS == 8:
        k = start[:, None] + inner
        inside = there & ((k < K) & (inner < GROUP))[None, :, :]
        tl.store(codes + (row[:, None, None] * K + k[None, :, :]), code.to(tl.uint8), mask=inside)
    else:
        PER: tl.constexpr = BYTES * 8 // BITS
        WORDS: tl.constexpr = code.shape[2] // PER
        if not EVEN:
            code = tl.where((start[:, None] + inner < K)[None, :, :], code, 0)
        parts = tl.reshape(code, (code.shape[0], code.shape[1], WORDS, PER))
        word = tl.sum(parts << (tl.arange(0, PER) * BITS)[None, None, None, :], 3)
        inner = tl.arange(0, WORDS)[None, :]
        column = start[:, None] // PER + inner
        inside = there & ((column < units) & (inner * PER < GROUP))[None, :, :]
        place = row[:, None, None] * units + column[None, :, :]
        if BYTES == 4:
            tl.store(codes.to(tl.pointer_type(tl.int32), bitcast=True) + place, word, mask=inside)
        else:
            for i in tl.static_range(BYTES):
                tl.store(codes + place * BYTES + i, (word >> (8 * i)).to(tl.uint8), mask=inside)


@triton.jit
def put_scales(scale, stored, row, rows, group, groups, row_step, group_step, SWIZZLE: tl.constexpr):
    """Stores scales ``[BR, BG]``.

    Args:
        scale: Pointer to fp32, uint8, or the bits of bf16.
        stored: What to store.
        row: int64 ``[BR]``; those from ``rows`` on do not exist, and so for ``group`` and ``groups``.
        row_step: Scales from one row to the next; in the swizzled layout, tiles of 4 groups that lie side
            by side.
        group_step: Scales from one group to the next.
        SWIZZLE: Whether to store tiles of 128 x 4 as cuBLASLt reads them: row r of a tile at ``r % 32 *
            16 + r // 32 * 4``.
    """
    r, c = row[:, None], group[None, :]
    if SWIZZLE:
        place = (r // 128 * row_step + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    else:
        place = r * row_step + c * group_step
    tl.store(scale + place, stored.to(scale.dtype.element_ty), mask=(r < rows) & (c < groups))


@triton.jit
def two_level(top, factor, HALF: tl.constexpr):
    """NVFP4 inside a known global factor: from the bits of the largest magnitudes ``[BR, BG]``, stored scales
    and divisors.
    """
    code = e4m3fn_scale(factor * tl.div_rn(top.to(tl.float32, bitcast=True), HALF))
    return code, tl.div_rn(e4m3fn_value(code), factor)


@triton.jit
def global_factor(top, HALF: tl.constexpr):
    """NVFP4's factor for the bits of a largest magnitude; 1 for zeros."""
    factor = tl.div_rn(448.0 * HALF, tl.maximum(top, TINY).to(tl.float32, bitcast=True))
    return tl.where(factor == float("inf"), 1.0, factor)


@triton.jit
def outer_scaled(
    value,
    x,
    outer,
    row,
    rows,
    start,
    K,
    FORMAT: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    OUTER: tl.constexpr,
    LOG: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """Divides a tile by one factor for each ``OUTER`` columns, rounded to the dtype of ``x``; stores the
    factors.
    """
    BR: tl.constexpr = value.shape[0]
    COUNT: tl.constexpr = value.shape[1] * value.shape[2] // OUTER
    wide = tl.reshape(value, (BR, COUNT, OUTER))
    factor = tl.div_rn(tl.max(magnitude(wide), 2).to(tl.float32, bitcast=True), HALF)
    factor = tl.where(factor == 0, EPS, factor)
    if SEARCH:
        factor = search.outer(wide, factor, FORMAT, HALF, GROUP, LOG)
    count = (K + OUTER - 1) // OUTER
    column = start // OUTER + tl.arange(0, COUNT)
    inside = (row < rows)[:, None] & (column < count)[None, :]
    tl.store(outer + row[:, None] * count + column[None, :], factor, mask=inside)
    return tl.reshape(round_as(tl.div_rn(wide, factor[:, :, None]), x), value.shape)


@triton.jit
def groups(
    x,
    codes,
    scale,
    outer,
    top,
    N,
    K,
    stride,
    units,
    blocks,
    row_step,
    group_step,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    EVEN: tl.constexpr,
    SCALE: tl.constexpr,
    HALF: tl.constexpr,
    UP: tl.constexpr,
    EMAX: tl.constexpr,
    GROUP: tl.constexpr,
    OUTER: tl.constexpr,
    LOG: tl.constexpr,
    OUTER_LOG: tl.constexpr,
    SEARCH: tl.constexpr,
    SWIZZLE: tl.constexpr,
    P: tl.constexpr,
    BR: tl.constexpr,
    BG: tl.constexpr,
):
    """A scale for each ``GROUP`` columns of each row.

    ``OUTER``: 0, columns of an outer scale, or -1 for one global factor, from ``top``. ``LOG``,
        ``OUTER_LOG``: what powers of
    two ``GROUP`` and ``OUTER`` are, for ``SEARCH``.

    Grid: ``cdiv(N, BR) * cdiv(blocks, BG)``, along rows first.
    """
    tiles = tl.cdiv(blocks, BG)
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64) * BR + tl.arange(0, BR)
    first = program % tiles * BG
    group = first + tl.arange(0, BG)
    inner = tl.arange(0, P)
    k = group[:, None] * GROUP + inner[None, :]
    inside = (row < N)[:, None, None] & ((k < K) & (inner < GROUP)[None, :])[None, :, :]
    value = fp32(x, row[:, None, None] * stride + k[None, :, :], inside)
    if OUTER > 0:
        value = outer_scaled(
            value, x, outer, row, N, first * GROUP, K, FORMAT, HALF, GROUP, OUTER, OUTER_LOG, SEARCH
        )
    amax = tl.max(magnitude(value), 2)
    if OUTER == -1:
        factor = global_factor(tl.load(top), HALF)
        stored, divisor = two_level(amax, factor, HALF)
        tl.store(outer, factor, mask=program == 0)
    else:
        factor = 1.0
        stored, divisor = scale_of(amax, SCALE, HALF, UP, EMAX)
    if SEARCH:
        stored, divisor = search.neighbours(value, stored, factor, FORMAT, SCALE, LOG)
    put_scales(scale, stored, row, N, group, blocks, row_step, group_step, SWIZZLE)
    code = codes_of(value, divisor[:, :, None], FORMAT, SCALE)
    put_codes(codes, code, row, N, group * GROUP, K, units, GROUP, BITS, BYTES, EVEN)


@triton.jit
def offsets(
    x,
    codes,
    scale,
    zero,
    N,
    K,
    stride,
    units,
    blocks,
    BYTES: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    LOG: tl.constexpr,
    BR: tl.constexpr,
    BG: tl.constexpr,
):
    """int4 with a scale and an offset in bf16 for each ``GROUP`` columns, by least squares. Grid: as
    ``groups``.

    The last block is filled up with its last element.
    """
    tiles = tl.cdiv(blocks, BG)
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64) * BR + tl.arange(0, BR)
    group = program % tiles * BG + tl.arange(0, BG)
    k = (group[:, None] * GROUP + tl.arange(0, GROUP)[None, :])[None, :, :]
    value = fp32(x, row[:, None, None] * stride + k, (row < N)[:, None, None] & (k < K))
    last = fp32(x, row * stride + K - 1, row < N)
    value = tl.where(k < K, value, last[:, None, None])
    step, start = search.least_squares(value, LOG)
    start = bf16(start - -8.0 * step)
    step = bf16(step)
    step = tl.where(step & 0x7FFFFFFF == 0, 0x34000000, step)
    put_scales(scale, step >> 16, row, N, group, blocks, blocks, 1, False)
    put_scales(zero, start >> 16, row, N, group, blocks, blocks, 1, False)
    value = value - start.to(tl.float32, bitcast=True)[:, :, None]
    code = encode(tl.div_rn(value, step.to(tl.float32, bitcast=True)[:, :, None]), value, "int4")
    put_codes(codes, code, row, N, group * GROUP, K, units, GROUP, 4, BYTES, EVEN)


@triton.jit
def row_part(
    value,
    top,
    codes,
    scale,
    row,
    rows,
    first,
    K,
    units,
    blocks,
    row_step,
    group_step,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    EVEN: tl.constexpr,
    SCALE: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    SWIZZLE: tl.constexpr,
):
    """Codes of ``[1, BG, P]`` of a row whose largest magnitude is ``top``; with ``GROUP``, its scales too."""
    start = first + tl.arange(0, value.shape[1]) * value.shape[2]
    if GROUP:
        factor = global_factor(top, HALF)
        stored, divisor = two_level(tl.max(magnitude(value), 2), factor, HALF)
        put_scales(scale, stored, row, rows, start // GROUP, blocks, row_step, group_step, SWIZZLE)
        divisor = divisor[:, :, None]
    else:
        stored, divisor = scale_of(top, SCALE, HALF, 0, 0)
    code = codes_of(value, divisor, FORMAT, SCALE)
    put_codes(codes, code, row, rows, start, K, units, value.shape[2], BITS, BYTES, EVEN)


@triton.jit
def rows(
    x,
    codes,
    scale,
    outer,
    N,
    K,
    stride,
    units,
    blocks,
    row_step,
    group_step,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    EVEN: tl.constexpr,
    SCALE: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    SWIZZLE: tl.constexpr,
    ONCE: tl.constexpr,
    BG: tl.constexpr,
    P: tl.constexpr,
):
    """One scale, or with ``GROUP`` one global factor, for each row, and a row per program.

    A row stays in registers when it fits (``ONCE``), else it is read again, from the cache. Grid: ``N``.
    """
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    column = tl.arange(0, BG)[:, None] * P + tl.arange(0, P)[None, :]
    value = fp32(x, row[:, None, None] * stride + column[None, :, :], (column < K)[None, :, :])
    most = magnitude(value)
    if not ONCE:
        for first in range(BG * P, K, BG * P):
            k = (first + column)[None, :, :]
            most = tl.maximum(most, magnitude(fp32(x, row[:, None, None] * stride + k, k < K)))
    top = tl.max(tl.max(tl.max(most, 2), 1), 0)
    if GROUP:
        tl.store(outer + row, global_factor(top, HALF) + tl.zeros((1,), tl.float32))
    else:
        stored, _divisor = scale_of(top, SCALE, HALF, 0, 0)
        tl.store(scale + row * row_step, (stored + tl.zeros((1,), stored.dtype)).to(scale.dtype.element_ty))
    if ONCE:
        # fmt: off
        row_part(
            value, top, codes, scale, row, N, 0, K, units, blocks, row_step, group_step,
            FORMAT, BITS, BYTES, EVEN, SCALE, HALF, GROUP, SWIZZLE,
        )
        # fmt: on
    else:
        for first in range(0, K, BG * P):
            k = (first + column)[None, :, :]
            value = fp32(x, row[:, None, None] * stride + k, k < K)
            # fmt: off
            row_part(
                value, top, codes, scale, row, N, first, K, units, blocks, row_step, group_step,
                FORMAT, BITS, BYTES, EVEN, SCALE, HALF, GROUP, SWIZZLE,
            )
            # fmt: on
