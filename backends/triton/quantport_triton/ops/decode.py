"""Stored codes to values, in registers: the part that every weight-only kernel shares. Bits and fp32 only, so that it
compiles alike from Volta to Blackwell, and for fp8 too where no conversion instruction exists (below sm_89).

A row of codes is read in words of ``BYTES`` bytes, each with ``BYTES * 8 / BITS`` codes, the first in the lowest bits: 4 bytes,
or 3 for codes of 6 bits, or 1 where rows are not whole words. The formats and their layouts: ``docs/numerics.md``.
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
        return tl.load(wide + rows * units + columns, mask=inside, other=0)
    if BYTES == 3:
        place = codes + (rows * units + columns) * 3
        low = tl.load(place, mask=inside, other=0).to(tl.int32)
        middle = tl.load(place + 1, mask=inside, other=0).to(tl.int32)
        high = tl.load(place + 2, mask=inside, other=0).to(tl.int32)
        return low | middle << 8 | high << 16
    return tl.load(codes + rows * units + columns, mask=inside, other=0).to(tl.int32)


@triton.jit
def values(word, shift, table, FORMAT: tl.constexpr, BITS: tl.constexpr):
    """Values of the codes at bit ``shift`` of each word: fp32, exact.

    Integers become the mantissa of 2**23, which is then subtracted: no conversion unit is needed, which is four times
    slower than these. Small floats put their exponent and mantissa where fp32 has them, and mend the bias by one exact
    multiplication, subnormals included. Code books are read from ``table``, 64 bytes that stay in the nearest cache.
    """
    code = word >> shift
    if FORMAT == "int4":  # stored as code + 8
        return (code & 15 | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    if FORMAT == "int8":  # two's complement: with its highest bit flipped it is code + 128
        return (code & 255 ^ 128 | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    if FORMAT == "table":
        return tl.load(table + (code & 15))
    if FORMAT == "e4m3fn":
        MANTISSA: tl.constexpr = 3
        BIAS: tl.constexpr = 7
    elif FORMAT == "e2m3":
        MANTISSA: tl.constexpr = 3
        BIAS: tl.constexpr = 1
    elif FORMAT == "e3m2":
        MANTISSA: tl.constexpr = 2
        BIAS: tl.constexpr = 3
    else:
        tl.static_assert(FORMAT == "e2m1")
        MANTISSA: tl.constexpr = 1
        BIAS: tl.constexpr = 1
    magnitude = (code & ((1 << (BITS - 1)) - 1)) << (23 - MANTISSA)
    sign = (code >> (BITS - 1)) << 31
    return (magnitude | sign).to(tl.float32, bitcast=True) * (2.0 ** (127 - BIAS))


@triton.jit
def scales(scale, zero, outer, table, rows, group, groups, inside, ROWS: tl.constexpr, SCALE: tl.constexpr, OUTER: tl.constexpr):
    """Scales of blocks of weights: fp32, of the shape of ``rows + group``.

    Args:
        scale: Pointer to stored scales ``[n / ROWS, groups]``.
        zero: With ``SCALE="double"``, pointer to the offset of all scales ``[1]``.
        outer: Pointer to outer scales ``[n, groups / OUTER]``; with ``SCALE="double"``, to the scale of each row ``[n]``.
        table: With ``SCALE="double"``, pointer to the 16 values of codes and then the 256 of scales.
        rows: Row indices, int64.
        group: Group indices.
        groups: Groups of a row.
        inside: Which groups exist; the others get some finite scale.
        ROWS: Rows that share a scale; 0 for all.
        SCALE: ``fp32``, ``bf16``, ``e8m0``, ``e4m3fn`` or ``double``.
        OUTER: Groups that share an outer scale, or 0.
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
    if OUTER:
        value *= tl.load(outer + rows * tl.cdiv(groups, OUTER) + group // OUTER, mask=inside, other=0)
    return value
