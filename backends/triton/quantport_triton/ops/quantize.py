"""Quantization of a matrix with scales of rows, or of groups of a row.

Every element is read once, or twice where a row does not fit into the registers of a program. A tile is
``[BR, BG, P]``: rows, groups of a row, and the elements of a group, padded to a power of two. Its scales
follow from the maximum over the last dimension; its codes are packed in registers and stored as whole words.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantport_triton.ops import search
from quantport_triton.ops.encode import (
    EPS,
    SMALLEST_NORMAL,
    bf16_bits,
    divide_and_encode,
    e4m3fn_scale,
    e4m3fn_value,
    encode,
    load_fp32,
    magnitude_bits,
    round_as,
    scale_and_divisor,
)


@triton.jit
def store_codes(
    codes,
    code,
    row,
    rows,
    start,
    K,
    words_per_row,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
):
    """Stores codes ``[BR, BG, P]`` of groups that begin at columns ``start`` ``[BG]``.

    Args:
        codes: Pointer to the codes, bytes.
        code: int32. Bits above the lowest ``BITS`` must be 0 where ``BITS`` is 4 or 6.
        row: Row indices, int64 ``[BR]``.
        rows: Rows that exist.
        start: First column of each group, which is the first of a word.
        K: Columns.
        words_per_row: Words in a row, where ``BITS`` is 4 or 6.
        GROUP: Columns of a group, a multiple of the codes in a word.
        BITS: Bits of a code: 4, 6 or 8.
        BYTES: Bytes in a word: 1, 3 or 4.
        WHOLE_WORDS: Whether K is a multiple of the codes in a word; else the last word is padded with zeros.
    """
    inner = tl.arange(0, code.shape[2])[None, :]
    row_exists = (row < rows)[:, None, None]
    if BITS == 8:
        k = start[:, None] + inner
        inside = row_exists & ((k < K) & (inner < GROUP))[None, :, :]
        tl.store(codes + (row[:, None, None] * K + k[None, :, :]), code.to(tl.uint8), mask=inside)
    else:
        PER_WORD: tl.constexpr = BYTES * 8 // BITS
        WORDS: tl.constexpr = code.shape[2] // PER_WORD
        if not WHOLE_WORDS:
            code = tl.where((start[:, None] + inner < K)[None, :, :], code, 0)
        parts = tl.reshape(code, (code.shape[0], code.shape[1], WORDS, PER_WORD))
        word = tl.sum(parts << (tl.arange(0, PER_WORD) * BITS)[None, None, None, :], 3)
        inner = tl.arange(0, WORDS)[None, :]
        column = start[:, None] // PER_WORD + inner
        inside = row_exists & ((column < words_per_row) & (inner * PER_WORD < GROUP))[None, :, :]
        place = row[:, None, None] * words_per_row + column[None, :, :]
        if BYTES == 4:
            tl.store(codes.to(tl.pointer_type(tl.int32), bitcast=True) + place, word, mask=inside)
        else:
            for i in tl.static_range(BYTES):
                tl.store(codes + place * BYTES + i, (word >> (8 * i)).to(tl.uint8), mask=inside)


@triton.jit
def store_scales(
    scale, stored, row, rows, group, groups_per_row, row_step, group_step, SWIZZLE: tl.constexpr
):
    """Stores scales ``[BR, BG]``.

    Args:
        scale: Pointer to fp32, uint8, or the bits of bf16.
        stored: What to store.
        row: Row indices, int64 ``[BR]``.
        rows: Rows that exist.
        group: Group indices ``[BG]``.
        groups_per_row: Groups that exist.
        row_step: Elements from one row to the next; where ``SWIZZLE``, tiles of 128 x 4 side by side.
        group_step: Elements from one group to the next.
        SWIZZLE: Whether to store tiles of 128 x 4 as cuBLASLt reads them: row r of a tile begins at
            ``r % 32 * 16 + r // 32 * 4``.
    """
    r, c = row[:, None], group[None, :]
    if SWIZZLE:
        place = (r // 128 * row_step + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    else:
        place = r * row_step + c * group_step
    tl.store(scale + place, stored.to(scale.dtype.element_ty), mask=(r < rows) & (c < groups_per_row))


@triton.jit
def nvfp4_scale_and_divisor(top, factor, HALF_RANGE: tl.constexpr):
    """Stored scales and divisors of NVFP4 groups, from the bits of their largest magnitudes ``[BR, BG]`` and
    the global factor.
    """
    code = e4m3fn_scale(factor * tl.div_rn(top.to(tl.float32, bitcast=True), HALF_RANGE))
    return code, tl.div_rn(e4m3fn_value(code), factor)


@triton.jit
def global_factor(top, HALF_RANGE: tl.constexpr):
    """The global factor of NVFP4, from the bits of the largest magnitude of the matrix; 1 for zeros."""
    factor = tl.div_rn(448.0 * HALF_RANGE, tl.maximum(top, SMALLEST_NORMAL).to(tl.float32, bitcast=True))
    return tl.where(factor == float("inf"), 1.0, factor)


@triton.jit
def divide_by_outer_scale(
    value,
    x,
    outer,
    row,
    rows,
    start,
    K,
    FORMAT: tl.constexpr,
    HALF_RANGE: tl.constexpr,
    GROUP: tl.constexpr,
    OUTER: tl.constexpr,
    OUTER_LOG2: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """Divides a tile by a factor for each ``OUTER`` columns, and stores the factors.

    The quotients are rounded to the dtype of ``x``.
    """
    BR: tl.constexpr = value.shape[0]
    COUNT: tl.constexpr = value.shape[1] * value.shape[2] // OUTER
    wide = tl.reshape(value, (BR, COUNT, OUTER))
    factor = tl.div_rn(tl.max(magnitude_bits(wide), 2).to(tl.float32, bitcast=True), HALF_RANGE)
    factor = tl.where(factor == 0, EPS, factor)
    if SEARCH:
        factor = search.best_outer_scale(wide, factor, FORMAT, HALF_RANGE, GROUP, OUTER_LOG2)
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
    words_per_row,
    groups_per_row,
    row_step,
    group_step,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
    SCALE: tl.constexpr,
    HALF_RANGE: tl.constexpr,
    ROUNDING: tl.constexpr,
    EMAX: tl.constexpr,
    GROUP: tl.constexpr,
    OUTER: tl.constexpr,
    GROUP_LOG2: tl.constexpr,
    OUTER_LOG2: tl.constexpr,
    SEARCH: tl.constexpr,
    SWIZZLE: tl.constexpr,
    P: tl.constexpr,
    BR: tl.constexpr,
    BG: tl.constexpr,
):
    """Quantizes with a scale for each ``GROUP`` columns of each row.

    ``OUTER`` is 0 without outer scales, else the columns of one, or -1 for one global factor, which follows
    from the bits of the largest magnitude in ``top`` ``[1]``. ``GROUP_LOG2`` and ``OUTER_LOG2``, the binary
    logarithms, are used where ``SEARCH``.

    Grid: ``cdiv(N, BR) * cdiv(groups_per_row, BG)``, the tiles of a row first.
    """
    tiles = tl.cdiv(groups_per_row, BG)
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64) * BR + tl.arange(0, BR)
    first = program % tiles * BG
    group = first + tl.arange(0, BG)
    inner = tl.arange(0, P)
    k = group[:, None] * GROUP + inner[None, :]
    inside = (row < N)[:, None, None] & ((k < K) & (inner < GROUP)[None, :])[None, :, :]
    value = load_fp32(x, row[:, None, None] * stride + k[None, :, :], inside)
    if OUTER > 0:
        value = divide_by_outer_scale(
            value, x, outer, row, N, first * GROUP, K, FORMAT, HALF_RANGE, GROUP, OUTER, OUTER_LOG2, SEARCH
        )
    amax = tl.max(magnitude_bits(value), 2)
    if OUTER == -1:
        factor = global_factor(tl.load(top), HALF_RANGE)
        stored, divisor = nvfp4_scale_and_divisor(amax, factor, HALF_RANGE)
        tl.store(outer, factor, mask=program == 0)
    else:
        factor = 1.0
        stored, divisor = scale_and_divisor(amax, SCALE, HALF_RANGE, ROUNDING, EMAX)
    if SEARCH:
        stored, divisor = search.best_scale(value, stored, factor, FORMAT, SCALE, GROUP_LOG2)
    store_scales(scale, stored, row, N, group, groups_per_row, row_step, group_step, SWIZZLE)
    code = divide_and_encode(value, divisor[:, :, None], FORMAT, SCALE)
    store_codes(codes, code, row, N, group * GROUP, K, words_per_row, GROUP, BITS, BYTES, WHOLE_WORDS)


@triton.jit
def offsets(
    x,
    codes,
    scale,
    zero,
    N,
    K,
    stride,
    words_per_row,
    groups_per_row,
    BYTES: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_LOG2: tl.constexpr,
    BR: tl.constexpr,
    BG: tl.constexpr,
):
    """Quantizes to int4 with a scale and an offset in bf16 for each ``GROUP`` columns, by least squares.

    The last group of a row is padded with its last element. Grid: as for ``groups``.
    """
    tiles = tl.cdiv(groups_per_row, BG)
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64) * BR + tl.arange(0, BR)
    group = program % tiles * BG + tl.arange(0, BG)
    k = (group[:, None] * GROUP + tl.arange(0, GROUP)[None, :])[None, :, :]
    value = load_fp32(x, row[:, None, None] * stride + k, (row < N)[:, None, None] & (k < K))
    last = load_fp32(x, row * stride + K - 1, row < N)
    value = tl.where(k < K, value, last[:, None, None])
    step, start = search.least_squares(value, GROUP_LOG2)
    start = bf16_bits(start - -8.0 * step)
    step = bf16_bits(step)
    step = tl.where(step & 0x7FFFFFFF == 0, 0x34000000, step)
    store_scales(scale, step >> 16, row, N, group, groups_per_row, groups_per_row, 1, False)
    store_scales(zero, start >> 16, row, N, group, groups_per_row, groups_per_row, 1, False)
    value = value - start.to(tl.float32, bitcast=True)[:, :, None]
    code = encode(tl.div_rn(value, step.to(tl.float32, bitcast=True)[:, :, None]), value, "int4")
    store_codes(codes, code, row, N, group * GROUP, K, words_per_row, GROUP, 4, BYTES, WHOLE_WORDS)


@triton.jit
def store_row_part(
    value,
    top,
    codes,
    scale,
    row,
    rows,
    first,
    K,
    words_per_row,
    groups_per_row,
    row_step,
    group_step,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
    SCALE: tl.constexpr,
    HALF_RANGE: tl.constexpr,
    GROUP: tl.constexpr,
    SWIZZLE: tl.constexpr,
):
    """Stores the codes of a part ``[1, BG, P]`` of a row, and where ``GROUP`` its scales.

    ``top`` holds the bits of the largest magnitude of the row.
    """
    start = first + tl.arange(0, value.shape[1]) * value.shape[2]
    if GROUP:
        factor = global_factor(top, HALF_RANGE)
        stored, divisor = nvfp4_scale_and_divisor(tl.max(magnitude_bits(value), 2), factor, HALF_RANGE)
        store_scales(scale, stored, row, rows, start // GROUP, groups_per_row, row_step, group_step, SWIZZLE)
        divisor = divisor[:, :, None]
    else:
        stored, divisor = scale_and_divisor(top, SCALE, HALF_RANGE, 0, 0)
    code = divide_and_encode(value, divisor, FORMAT, SCALE)
    store_codes(codes, code, row, rows, start, K, words_per_row, value.shape[2], BITS, BYTES, WHOLE_WORDS)


@triton.jit
def rows(
    x,
    codes,
    scale,
    outer,
    N,
    K,
    stride,
    words_per_row,
    groups_per_row,
    row_step,
    group_step,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
    SCALE: tl.constexpr,
    HALF_RANGE: tl.constexpr,
    GROUP: tl.constexpr,
    SWIZZLE: tl.constexpr,
    READ_ONCE: tl.constexpr,
    BG: tl.constexpr,
    P: tl.constexpr,
):
    """Quantizes with one scale for each row, or where ``GROUP`` one NVFP4 factor and a scale for each group.

    A program has a row. A row that fits stays in registers (``READ_ONCE``); a longer one is read again, from
    the cache. Grid: ``N``.
    """
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    column = tl.arange(0, BG)[:, None] * P + tl.arange(0, P)[None, :]
    value = load_fp32(x, row[:, None, None] * stride + column[None, :, :], (column < K)[None, :, :])
    largest_bits = magnitude_bits(value)
    if not READ_ONCE:
        for first in range(BG * P, K, BG * P):
            k = (first + column)[None, :, :]
            largest_bits = tl.maximum(
                largest_bits, magnitude_bits(load_fp32(x, row[:, None, None] * stride + k, k < K))
            )
    top = tl.max(tl.max(tl.max(largest_bits, 2), 1), 0)
    if GROUP:
        tl.store(outer + row, global_factor(top, HALF_RANGE) + tl.zeros((1,), tl.float32))
    else:
        stored, _divisor = scale_and_divisor(top, SCALE, HALF_RANGE, 0, 0)
        tl.store(scale + row * row_step, (stored + tl.zeros((1,), stored.dtype)).to(scale.dtype.element_ty))
    if READ_ONCE:
        # fmt: off
        store_row_part(
            value, top, codes, scale, row, N, 0, K, words_per_row, groups_per_row, row_step, group_step,
            FORMAT, BITS, BYTES, WHOLE_WORDS, SCALE, HALF_RANGE, GROUP, SWIZZLE,
        )
        # fmt: on
    else:
        for first in range(0, K, BG * P):
            k = (first + column)[None, :, :]
            value = load_fp32(x, row[:, None, None] * stride + k, k < K)
            # fmt: off
            store_row_part(
                value, top, codes, scale, row, N, first, K, words_per_row, groups_per_row, row_step,
                group_step, FORMAT, BITS, BYTES, WHOLE_WORDS, SCALE, HALF_RANGE, GROUP, SWIZZLE,
            )
            # fmt: on
