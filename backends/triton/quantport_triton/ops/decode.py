"""Decodes stored codes to values in registers, for every weight-only kernel.

It uses bit operations and fp32 only, so that it compiles alike from Volta to Blackwell, also for fp8 where
there is no conversion instruction (below sm_89).

A row of codes is read in words of ``BYTES`` bytes: 4, or 3 for 6-bit codes, or 1 where a row is not a whole
number of words. A word holds ``BYTES * 8 / BITS`` codes, the first in the lowest bits. The formats and their
layouts are in ``docs/numerics.md``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_words(codes, rows, columns, words_per_row, inside, BYTES: tl.constexpr):
    """Loads words of codes: int32, of the shape of ``rows + columns``.

    Args:
        codes: Pointer to the codes.
        rows: Row indices, int64, broadcastable with ``columns``.
        columns: Word indices.
        words_per_row: Words in a row.
        inside: Which words exist; the others are 0.
        BYTES: Bytes in a word: 1, 3 or 4.
    """
    if BYTES == 4:
        wide = codes.to(tl.pointer_type(tl.int32), bitcast=True)
        word = tl.load(wide + rows * words_per_row + columns, mask=inside, other=0)
    elif BYTES == 3:
        place = codes + (rows * words_per_row + columns) * 3
        low = tl.load(place, mask=inside, other=0).to(tl.int32)
        middle = tl.load(place + 1, mask=inside, other=0).to(tl.int32)
        high = tl.load(place + 2, mask=inside, other=0).to(tl.int32)
        word = low | middle << 8 | high << 16
    else:
        word = tl.load(codes + rows * words_per_row + columns, mask=inside, other=0).to(tl.int32)
    return word


@triton.jit
def decode_values(word, place, table, FORMAT: tl.constexpr, BITS: tl.constexpr):
    """Decodes codes to their exact values in fp32: ``decode_unscaled`` times ``place_factor``.

    Args:
        word: int32.
        place: Index of the code in its word, broadcastable with ``word``.
        table: Where ``FORMAT`` is ``table``, pointer to the 16 values of a code book; its 64 bytes stay in
            the L1 cache.
        FORMAT: A format of ``quantport.scheme.formats``, or ``table``.
        BITS: Bits of a code.
    """
    return decode_unscaled(word, place, table, FORMAT, BITS) * place_factor(place, FORMAT)


@triton.jit
def decode_unscaled(word, place, table, FORMAT: tl.constexpr, BITS: tl.constexpr):
    """Decodes codes up to the factor ``place_factor``; the arguments are those of ``decode_values``.

    An integer code stays where it is in the word and becomes mantissa bits of 2**23, which is then
    subtracted. That takes one logic and one fp32 instruction for each code; a shift, a mask and a conversion
    would take four times as long.
    """
    if FORMAT == "int4":  # stored as code + 8
        half = tl.where(place < 4, word, word >> 16)
        shift = (place & 3) * 4
        bits = half & (15 << shift) | 0x4B000000
        value = bits.to(tl.float32, bitcast=True) - (8388608 + (8 << shift)).to(tl.float32)
    elif FORMAT == "int8":  # two's complement: with its highest bit flipped it is code + 128
        half = tl.where(place < 2, word ^ 0x00008080, (word ^ -0x7F800000) >> 16)
        shift = (place & 1) * 8
        bits = half & (255 << shift) | 0x4B000000
        value = bits.to(tl.float32, bitcast=True) - (8388608 + (128 << shift)).to(tl.float32)
    elif FORMAT == "table":
        value = tl.load(table + (word >> place * BITS & 15))
    elif FORMAT == "e4m3fn":
        value = decode_small_float(word >> place * BITS, BITS, 3, 7)
    elif FORMAT == "e3m2":
        value = decode_small_float(word >> place * BITS, BITS, 2, 3)
    elif FORMAT == "e2m3":
        value = decode_small_float(word >> place * BITS, BITS, 3, 1)
    else:
        tl.static_assert(FORMAT == "e2m1")
        value = decode_small_float(word >> place * BITS, BITS, 1, 1)
    return value


@triton.jit
def place_factor(place, FORMAT: tl.constexpr):
    """The power of two that ``decode_unscaled`` of the code at ``place`` must be multiplied by: exact."""
    if FORMAT == "int4":
        exponent = (place & 3) * 4
    elif FORMAT == "int8":
        exponent = (place & 1) * 8
    else:
        exponent = place * 0
    return ((127 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def decode_small_float(code, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Decodes small floats without infinities to fp32. Bits of ``code`` above ``BITS`` are ignored."""
    magnitude = (code & ((1 << (BITS - 1)) - 1)) << (23 - MANTISSA)
    sign = (code >> (BITS - 1)) << 31
    return (magnitude | sign).to(tl.float32, bitcast=True) * (2.0 ** (127 - BIAS))


@triton.jit
def load_scales(
    scale,
    zero,
    outer,
    table,
    rows,
    group,
    groups_per_row,
    inside,
    SCALE_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    OUTER: tl.constexpr,
):
    """Loads the scales of groups of weights: fp32, of the shape of ``rows + group``.

    Args:
        scale: Pointer to stored scales ``[N / SCALE_ROWS, groups_per_row]``.
        zero: Where ``SCALE`` is ``double``, pointer to the offset of all scales ``[1]``.
        outer: Pointer to outer scales ``[N, groups_per_row / OUTER]`` or ``[1]``; where ``SCALE`` is
            ``double``, to those of rows ``[N]``.
        table: Where ``SCALE`` is ``double``, pointer to the 16 values of codes, then the 256 of scales.
        rows: Row indices, int64.
        group: Group indices.
        groups_per_row: Groups in a row.
        inside: Which groups exist; the scales of the others are finite and mean nothing.
        SCALE_ROWS: Rows that share a scale; 0 if all do.
        SCALE: ``fp32``, ``bf16``, ``e8m0``, ``e4m3fn`` or ``double``.
        OUTER: Groups that share an outer scale, which multiplies; 0 if there is none; -1 for one factor of
            the whole weight, which divides.
    """
    place = group if SCALE_ROWS == 0 else rows // SCALE_ROWS * groups_per_row + group
    stored = tl.load(scale + place, mask=inside, other=0)
    if SCALE == "e8m0":  # 0 is 2**-127, subnormal in fp32
        bits = stored.to(tl.int32) << 23
        value = tl.where(stored == 0, 0x400000, bits).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3fn":
        value = decode_values(stored.to(tl.int32), 0, table, "e4m3fn", 8)
    elif SCALE == "double":
        value = tl.load(table + 16 + stored) * tl.load(outer + rows, mask=inside, other=0) + tl.load(zero)
        value = tl.where(value == 0, 2.0**-23, value)
    else:
        value = stored.to(tl.float32)
    if OUTER == -1:
        value = tl.div_rn(value, tl.load(outer))
    elif OUTER:
        value *= tl.load(outer + rows * tl.cdiv(groups_per_row, OUTER) + group // OUTER, mask=inside, other=0)
    return value
