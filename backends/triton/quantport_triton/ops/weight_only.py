"""Weight-only multiplication ``y = x W^T (+ bias)``: W as stored codes, x and y in 16 bits, sums in fp32.

The number of tokens decides between three kernels:

* ``gemv`` for one token: a program reads whole rows of codes once, in wide loads, and multiplies in
  registers, without a matrix unit.
* ``gemm`` for some tokens: W is the left operand, since its rows fill the 64 or 128 rows of a matrix unit,
  and x the right one, where 16 tokens waste nothing. Where there are few tiles, K is split over programs and
  the parts are added in a fixed order.
* ``dequantize`` for many tokens: the weight in 16 bits, for the vendor's own matmul.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantport_triton.ops.decode import decode_unscaled, decode_values, load_scales, load_words, place_factor


@triton.jit
def load_scale_and_offset(
    scale,
    zero,
    outer,
    table,
    row,
    column,
    first,
    inside,
    groups_per_row,
    PER_WORD: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    OUTER: tl.constexpr,
    ZERO: tl.constexpr,
    BW: tl.constexpr,
):
    """Loads the scales and offsets of words: fp32, of the shape of ``row + column``, or of ``row`` where one
    group holds all ``BW`` words from ``first`` on. ``inside`` says which rows exist.
    """
    if GROUP % (BW * PER_WORD) == 0:
        group = first * PER_WORD // GROUP + tl.zeros_like(row).to(tl.int32)
    else:
        group = column * PER_WORD // GROUP
    inside = inside & (group < groups_per_row)
    factor = load_scales(
        scale, zero, outer, table, row, group, groups_per_row, inside, SCALE_ROWS, SCALE, OUTER
    )
    offset = 0.0
    if ZERO:
        offset = tl.load(zero + row * groups_per_row + group, mask=inside, other=0).to(tl.float32)
    return factor, offset


@triton.jit
def decode_tile(
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
    words_per_row,
    groups_per_row,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    OUTER: tl.constexpr,
    ZERO: tl.constexpr,
    BW: tl.constexpr,
):
    """Decodes the codes at ``place`` in the words ``column`` (the ``BW`` from ``first`` on) of each ``row``.

    The result is fp32, of the shape that the three broadcast to. Scales of whole rows (``GROUP`` is 0) are
    left to ``scale_and_bias``.
    """
    word = load_words(codes, row, column, words_per_row, inside & (column < words_per_row), BYTES)
    value = decode_values(word, place, table, FORMAT, BITS)
    if GROUP:
        PER_WORD: tl.constexpr = BYTES * 8 // BITS
        factor, offset = load_scale_and_offset(
            scale,
            zero,
            outer,
            table,
            row,
            column,
            first,
            inside,
            groups_per_row,
            PER_WORD,
            SCALE_ROWS,
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
def scale_and_bias(
    total, scale, bias, rows, inside, SCALE_ROWS: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr
):
    """Applies the scales of whole rows and the bias. ``total`` is fp32, broadcastable with ``rows``."""
    if GROUP == 0:
        total *= tl.load(scale + rows * SCALE_ROWS, mask=inside, other=0)  # SCALE_ROWS: 1, or 0 for one scale
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
    words_per_row,
    groups_per_row,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    OUTER: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """Computes ``BN`` outputs of one token per program. Each word has its own sum over K; they are added at
    the end.

    Grid: ``(cdiv(N, BN), M)``.
    """
    PER_WORD: tl.constexpr = BYTES * 8 // BITS
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BN, BW), tl.float32)
    place = tl.arange(0, PER_WORD)[:, None]
    for first in range(0, words_per_row, BW):
        column = first + tl.arange(0, BW)
        word = load_words(
            codes,
            row[:, None],
            column[None, :],
            words_per_row,
            (row < N)[:, None] & (column < words_per_row)[None, :],
            BYTES,
        )
        k = column[None, :] * PER_WORD + place
        part = tl.load(x + token * K + k, mask=k < K, other=0).to(tl.float32)
        value = decode_unscaled(word[:, None, :], place[None, :, :], table, FORMAT, BITS)
        product = tl.sum(value * (part * place_factor(place, FORMAT))[None, :, :], 1)
        if GROUP:  # a group holds whole words
            factor, offset = load_scale_and_offset(
                scale,
                zero,
                outer,
                table,
                row[:, None],
                column[None, :],
                first,
                (row < N)[:, None],
                groups_per_row,
                PER_WORD,
                SCALE_ROWS,
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
    out = scale_and_bias(tl.sum(total, 1), scale, bias, row, row < N, SCALE_ROWS, GROUP, BIAS)
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
    words_per_row,
    groups_per_row,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
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
    """Computes a tile ``[BN, BM]`` of ``W x^T`` per program, over one of ``SPLIT`` parts of K.

    With ``SPLIT > 1``, y is fp32 ``[SPLIT, M, N]``, which ``add`` sums. Grid:
    ``(cdiv(N, BN), cdiv(M, BM), SPLIT)``.
    """
    PER_WORD: tl.constexpr = BYTES * 8 // BITS
    BK: tl.constexpr = BW * PER_WORD
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    token = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    part = tl.program_id(2)
    steps = tl.cdiv(tl.cdiv(words_per_row, BW), SPLIT)
    total = tl.zeros((BN, BM), tl.float32)
    word = tl.arange(0, BW)[:, None, None]
    place = tl.arange(0, PER_WORD)[None, :, None]  # rows of W last, so that a thread has whole rows
    for step in range(part * steps, part * steps + steps):
        first = step * BW
        value = decode_tile(
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
            words_per_row,
            groups_per_row,
            FORMAT,
            BITS,
            BYTES,
            SCALE_ROWS,
            GROUP,
            SCALE,
            OUTER,
            ZERO,
            BW,
        )
        left = tl.trans(tl.reshape(value, (BK, BN)).to(x.dtype.element_ty))
        k = first * PER_WORD + tl.arange(0, BK)
        right = tl.load(
            x + token[:, None] * K + k[None, :], mask=(token < M)[:, None] & (k < K)[None, :], other=0
        )
        total = tl.dot(left, tl.trans(right), total)
    place = token[None, :] * N + row[:, None]
    inside = (token < M)[None, :] & (row < N)[:, None]
    if SPLIT == 1:
        total = scale_and_bias(total, scale, bias, row[:, None], (row < N)[:, None], SCALE_ROWS, GROUP, BIAS)
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
    SCALE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
):
    """Adds the parts of ``gemm``, first to last, so that each call gives the same bits; then scale and bias.

    Grid: ``(cdiv(N, BN), M)``.
    """
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BN,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + (part * M + token) * N + row, mask=row < N, other=0)
    total = scale_and_bias(total, scale, bias, row, row < N, SCALE_ROWS, GROUP, BIAS)
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
    words_per_row,
    groups_per_row,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    OUTER: tl.constexpr,
    ZERO: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """Decodes the weight ``[N, K]`` to the dtype of y, rounded once.

    Grid: ``(cdiv(words_per_row, BW), cdiv(N, BN))``.
    """
    PER_WORD: tl.constexpr = BYTES * 8 // BITS
    row = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    first = tl.program_id(0) * BW
    column = (first + tl.arange(0, BW))[None, None, :]
    place = tl.arange(0, PER_WORD)[None, :, None]
    inside = (row < N)[:, None, None]
    value = decode_tile(
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
        words_per_row,
        groups_per_row,
        FORMAT,
        BITS,
        BYTES,
        SCALE_ROWS,
        GROUP,
        SCALE,
        OUTER,
        ZERO,
        BW,
    )
    value = scale_and_bias(value, scale, scale, row[:, None, None], inside, SCALE_ROWS, GROUP, False)
    k = column * PER_WORD + place
    tl.store(y + row[:, None, None] * K + k, value.to(y.dtype.element_ty), mask=inside & (k < K))
