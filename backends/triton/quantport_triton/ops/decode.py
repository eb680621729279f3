"""Stored codes to values, in registers: the part that every weight-only kernel shares. Bits and fp32 only, so
that it compiles alike from Volta to Blackwell, and for fp8 too where no conversion instruction exists (below
sm_89).

A row of codes is read in words of ``BYTES`` bytes, each with ``BYTES * 8 / BITS`` codes, the first in the
lowest bits: 4 bytes, or 3 for codes of 6 bits, or 1 where rows are not whole words. The formats and their
layouts: ``docs/numerics.md``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words(codes, rows, columns, units, inside, BYTES: tl.constexpr):
    """Words of rows: int32, of the shape of ``rows + columns``.

    Args:
        codes: Pointer to the codes.
        rows: Row indices, int64, broadcastable with ``columns``.
        columns: Word indices.
        units: Words of a row.
        inside: Which words exist; the others read as 0.
        BYTES: Bytes of a word: 1, 3 or 4.
    """
    if BYTES == 4:
        wide = codes.to(tl.pointer_type(tl.int32), bitcast=True)
        word = tl.load(wide + rows * units + columns, mask=inside, other=0)
    elif BYTES == 3:
        place = codes + (rows * units + columns) * 3
        low = tl.load(place, mask=inside, other=0).to(tl.int32)
        middle = tl.load(place + 1, mask=inside, other=0).to(tl.int32)
        high = tl.load(place + 2, mask=inside, other=0).to(tl.int32)
        word = low | middle << 8 | high << 16
    else:
        word = tl.load(codes + rows * units + columns, mask=inside, other=0).to(tl.int32)
    return word


@triton.jit
def values(word, place, table, FORMAT: tl.constexpr, BITS: tl.constexpr):
    """Values of codes: fp32, exact, as ``raw * unit(place)``.

    Args:
        word: int32.
        place: Index of the code in its word, broadcastable with ``word``.
        table: With ``FORMAT="table"``, pointer to the 16 values of a code book: 64 bytes that stay in the
            nearest cache.
        FORMAT: A format of ``quantport.scheme.formats``, or ``table``.
        BITS: Bits of a code.
    """
    return raw(word, place, table, FORMAT, BITS) * unit(place, FORMAT)


@triton.jit
def raw(word, place, table, FORMAT: tl.constexpr, BITS: tl.constexpr):
    """``values`` over ``unit``. Integers are left where they stand in the word, as mantissa bits of 2**23,
    which is then subtracted: one logic and one fp32 instruction for each, where a shift, a mask and a
    conversion would
        take four times as long.
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
        value = small_float(word >> place * BITS, BITS, 3, 7)
    elif FORMAT == "e3m2":
        value = small_float(word >> place * BITS, BITS, 2, 3)
    elif FORMAT == "e2m3":
        value = small_float(word >> place * BITS, BITS, 3, 1)
    else:
        tl.static_assert(FORMAT == "e2m1")
        value = small_float(word >> place * BITS, BITS, 1, 1)
    return value


@triton.jit
def unit(place, FORMAT: tl.constexpr):
    """What ``raw`` at a place of the word must be multiplied with: a power of two, which changes no digit."""
    if FORMAT == "int4":
        exponent = (place & 3) * 4
    elif FORMAT == "int8":
        exponent = (place & 1) * 8
    else:
        exponent = place * 0
    return ((127 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def small_float(code, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Values of small floats without infinities: fp32. Higher bits of ``code`` do not matter."""
    magnitude = (code & ((1 << (BITS - 1)) - 1)) << (23 - MANTISSA)
    sign = (code >> (BITS - 1)) << 31
    return (magnitude | sign).to(tl.float32, bitcast=True) * (2.0 ** (127 - BIAS))


@triton.jit
def scales(
    scale,
    zero,
    outer,
    table,
    rows,
    group,
    groups,
    inside,
    ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    OUTER: tl.constexpr,
):
    """Scales of blocks of weights: fp32, of the shape of ``rows + group``.

    Args:
        scale: Pointer to stored scales ``[n / ROWS, groups]``.
        zero: With ``SCALE="double"``, pointer to the offset of all scales ``[1]``.
        outer: Pointer to outer scales ``[n, groups / OUTER]`` or ``[1]``; with ``SCALE="double"``, to
            those of rows ``[n]``.
        table: With ``SCALE="double"``, pointer to the 16 values of codes and then the 256 of scales.
        rows: Row indices, int64.
        group: Group indices.
        groups: Groups of a row.
        inside: Which groups exist; the others get some finite scale.
        ROWS: Rows that share a scale; 0 for all.
        SCALE: ``fp32``, ``bf16``, ``e8m0``, ``e4m3fn`` or ``double``.
        OUTER: Groups that share an outer scale, which multiplies; 0 for none; -1 for one factor of all,
            which divides.
    """
    place = group if ROWS == 0 else rows // ROWS * groups + group
    stored = tl.load(scale + place, mask=inside, other=0)
    if SCALE == "e8m0":  # 0 is 2**-127, subnormal in fp32
        bits = stored.to(tl.int32) << 23
        value = tl.where(stored == 0, 0x400000, bits).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3fn":
        value = values(stored.to(tl.int32), 0, table, "e4m3fn", 8)
    elif SCALE == "double":
        value = tl.load(table + 16 + stored) * tl.load(outer + rows, mask=inside, other=0) + tl.load(zero)
        value = tl.where(value == 0, 2.0**-23, value)
    else:
        value = stored.to(tl.float32)
    if OUTER == -1:
        value = tl.div_rn(value, tl.load(outer))
    elif OUTER:
        value *= tl.load(outer + rows * tl.cdiv(groups, OUTER) + group // OUTER, mask=inside, other=0)
    return value
