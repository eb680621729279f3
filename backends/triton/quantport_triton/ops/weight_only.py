"""Weight-only multiplication ``y = x W^T (+ bias)``: W as stored codes, x and y in 16 bits, sums in fp32.

Three ways, by the number of rows of x. ``gemv`` for one row: every program reads whole rows of codes once, as
wide as the memory bus wants them, and multiplies in registers; it needs no matrix unit. ``gemm`` for some
rows: W is the left operand, whose rows fill the 64 or 128 rows that matrix units want, and x the right one,
so that 16 tokens waste nothing; where few tiles exist, K is split over programs and the parts are added in a
fixed order. ``dequantize`` for many rows: values in 16 bits, once, for the vendor's own matmul.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantport_triton.ops.decode import raw, scales, unit, values, words


@triton.jit
def factors(
    scale,
    zero,
    outer,
    table,
    row,
    column,
    first,
    inside,
    groups,
    PER: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    OUTER: tl.constexpr,
    ZERO: tl.constexpr,
    BW: tl.constexpr,
):
    """Scales and offsets of words: fp32, of the shape of ``row + column``, or of ``row`` where one group
    holds the ``BW`` words from ``first`` on. ``inside``: which rows exist."""
    if GROUP % (BW * PER) == 0:
        group = first * PER // GROUP + tl.zeros_like(row).to(tl.int32)
    else:
        group = column * PER // GROUP
    inside = inside & (group < groups)
    factor = scales(scale, zero, outer, table, row, group, groups, inside, ROWS, SCALE, OUTER)
    offset = 0.0
    if ZERO:
        offset = tl.load(zero + row * groups + group, mask=inside, other=0).to(tl.float32)
    return factor, offset


@triton.jit
def tile(
    codes,
    scale,
    zero,
    outer,
    table,
    row,
    column,
    place,
    first,
    inside,
    units,
    groups,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    OUTER: tl.constexpr,
    ZERO: tl.constexpr,
    BW: tl.constexpr,
):
    """Values of the codes at ``place`` of the words ``column`` (``BW`` of them from ``first`` on) of each
    ``row``: fp32, of the shape that the three make together. Scales of whole rows (``GROUP=0``) are left to
    the caller."""
    word = words(codes, row, column, units, inside & (column < units), BYTES)
    value = values(word, place, table, FORMAT, BITS)
    if GROUP:
        PER: tl.constexpr = BYTES * 8 // BITS
        factor, offset = factors(
            scale,
            zero,
            outer,
            table,
            row,
            column,
            first,
            inside,
            groups,
            PER,
            ROWS,
            GROUP,
            SCALE,
            OUTER,
            ZERO,
            BW,
        )
        value *= factor
        if ZERO:
            value += offset
    return value


@triton.jit
def finish(total, scale, bias, rows, inside, ROWS: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr):
    """Per-row scale and bias: what a sum over K may wait for. ``total`` is fp32 ``[rows, ...]``, as
    ``rows``.
    """
    if GROUP == 0:
        total *= tl.load(scale + rows * ROWS, mask=inside, other=0)  # ROWS is 1, or 0 for one scale
    if BIAS:
        total += tl.load(bias + rows, mask=inside, other=0).to(tl.float32)
    return total


@triton.jit
def gemv(
    x,
    codes,
    scale,
    zero,
    outer,
    table,
    bias,
    y,
    N,
    K,
    units,
    groups,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    OUTER: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """``BN`` outputs of one row of x per program; the sum over K is kept per word and folded once at the end.

    Grid: ``(cdiv(N, BN), M)``.
    """
    PER: tl.constexpr = BYTES * 8 // BITS
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BN, BW), tl.float32)
    place = tl.arange(0, PER)[:, None]
    for first in range(0, units, BW):
        column = first + tl.arange(0, BW)
        word = words(
            codes, row[:, None], column[None, :], units, (row < N)[:, None] & (column < units)[None, :], BYTES
        )
        k = column[None, :] * PER + place
        part = tl.load(x + token * K + k, mask=k < K, other=0).to(tl.float32)
        value = raw(word[:, None, :], place[None, :, :], table, FORMAT, BITS)
        product = tl.sum(value * (part * unit(place, FORMAT))[None, :, :], 1)
        if GROUP:  # a group holds whole words
            factor, offset = factors(
                scale,
                zero,
                outer,
                table,
                row[:, None],
                column[None, :],
                first,
                (row < N)[:, None],
                groups,
                PER,
                ROWS,
                GROUP,
                SCALE,
                OUTER,
                ZERO,
                BW,
            )
            product *= factor
            if ZERO:
                product += offset * tl.sum(part, 0)[None, :]
        total += product
    out = finish(tl.sum(total, 1), scale, bias, row, row < N, ROWS, GROUP, BIAS)
    tl.store(y + token * N + row, out.to(y.dtype.element_ty), mask=row < N)


@triton.jit
def gemm(
    x,
    codes,
    scale,
    zero,
    outer,
    table,
    bias,
    y,
    M,
    N,
    K,
    units,
    groups,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    OUTER: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """A tile ``[BN, BM]`` of ``W x^T`` per program, over a ``SPLIT``-th of K.

    Grid: ``(cdiv(N, BN), cdiv(M, BM), SPLIT)``. With ``SPLIT > 1``, y is fp32 ``[SPLIT, M, N]``, and
        ``add`` finishes.
    """
    PER: tl.constexpr = BYTES * 8 // BITS
    BK: tl.constexpr = BW * PER
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    token = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    part = tl.program_id(2)
    steps = tl.cdiv(tl.cdiv(units, BW), SPLIT)
    total = tl.zeros((BN, BM), tl.float32)
    word = tl.arange(0, BW)[:, None, None]
    place = tl.arange(0, PER)[None, :, None]  # rows of W last, so that each is one thread's
    for step in range(part * steps, part * steps + steps):
        first = step * BW
        value = tile(
            codes,
            scale,
            zero,
            outer,
            table,
            row[None, None, :],
            first + word,
            place,
            first,
            (row < N)[None, None, :],
            units,
            groups,
            FORMAT,
            BITS,
            BYTES,
            ROWS,
            GROUP,
            SCALE,
            OUTER,
            ZERO,
            BW,
        )
        left = tl.trans(tl.reshape(value, (BK, BN)).to(x.dtype.element_ty))
        k = first * PER + tl.arange(0, BK)
        right = tl.load(
            x + token[:, None] * K + k[None, :], mask=(token < M)[:, None] & (k < K)[None, :], other=0
        )
        total = tl.dot(left, tl.trans(right), total)
    place = token[None, :] * N + row[:, None]
    inside = (token < M)[None, :] & (row < N)[:, None]
    if SPLIT == 1:
        total = finish(total, scale, bias, row[:, None], (row < N)[:, None], ROWS, GROUP, BIAS)
    else:
        place += part.to(tl.int64) * M * N
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def add(
    parts,
    scale,
    bias,
    y,
    M,
    N,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
):
    """Adds the parts of ``gemm``, first to last: the same bits at every call. Grid: ``(cdiv(N, BN), M)``."""
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BN,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + (part * M + token) * N + row, mask=row < N, other=0)
    total = finish(total, scale, bias, row, row < N, ROWS, GROUP, BIAS)
    tl.store(y + token * N + row, total.to(y.dtype.element_ty), mask=row < N)


@triton.jit
def dequantize(
    codes,
    scale,
    zero,
    outer,
    table,
    y,
    N,
    K,
    units,
    groups,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    OUTER: tl.constexpr,
    ZERO: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """Values ``[N, K]`` in the dtype of y, rounded once. Grid: ``(cdiv(units, BW), cdiv(N, BN))``."""
    PER: tl.constexpr = BYTES * 8 // BITS
    row = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    first = tl.program_id(0) * BW
    column = (first + tl.arange(0, BW))[None, None, :]
    place = tl.arange(0, PER)[None, :, None]
    inside = (row < N)[:, None, None]
    value = tile(
        codes,
        scale,
        zero,
        outer,
        table,
        row[:, None, None],
        column,
        place,
        first,
        inside,
        units,
        groups,
        FORMAT,
        BITS,
        BYTES,
        ROWS,
        GROUP,
        SCALE,
        OUTER,
        ZERO,
        BW,
    )
    value = finish(value, scale, scale, row[:, None, None], inside, ROWS, GROUP, False)
    k = column * PER + place
    tl.store(y + row[:, None, None] * K + k, value.to(y.dtype.element_ty), mask=inside & (k < K))
