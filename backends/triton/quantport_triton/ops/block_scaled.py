"""Multiplication of MX and NVFP4 operands, ``y = x W^T (+ bias)``: the matrix unit applies the scales of
blocks along K.

A program computes a tile ``[BN, BM]`` of ``W x^T``, over a ``SPLIT``-th of K. W is always the left operand:
the matrix unit of data-center Blackwell wants 128 rows on the left, which weights have and few tokens have
not. Order of tiles, splits and what follows the sum are those of ``scaled``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantport_triton.ops.scaled import finish, place


@triton.jit
def rows_of(codes, row, inside, first, width, COLUMNS: tl.constexpr):
    """Columns ``first`` to ``first + COLUMNS`` of rows of ``width``: ``[rows, COLUMNS]``; what does not exist
    is 0.
    """
    column = first + tl.arange(0, COLUMNS)
    return tl.load(
        codes + row[:, None] * width + column[None, :],
        mask=inside[:, None] & (column < width)[None, :],
        other=0.0,
    )


@triton.jit
def widened(pair, BN: tl.constexpr, BK: tl.constexpr):
    """e2m1 codes of bytes ``[BN, BK / 2]`` as e4m3 ``[BN, BK]``, over 64: sign, exponent and mantissa move to
    where e4m3 has them, and what differs is the bias, 1 or 7; subnormals too."""
    even = (pair & 8) << 4 | (pair & 7) << 2
    odd = pair & 128 | pair >> 2 & 28
    return tl.reshape(tl.join(even, odd), (BN, BK))


@triton.jit
def gemm(
    x,
    x_scale,
    codes,
    scale,
    of_token,
    of_row,
    bias,
    y,
    M,
    N,
    K,
    width,
    units,
    groups,
    X: tl.constexpr,
    W: tl.constexpr,
    GROUP: tl.constexpr,
    TOKEN: tl.constexpr,
    ROW: tl.constexpr,
    BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One tile of y, or of one of its ``SPLIT`` parts ``[SPLIT, M, N]``, which ``scaled.add`` finishes.

    Grid: ``(cdiv(M, BM) * cdiv(N, BN), SPLIT)``. ``X`` and ``W`` are the formats, ``e4m3`` or ``e2m1``,
        ``width`` and ``units`` the
    bytes of a row of codes, ``groups`` the scales of a row: e8m0 as bytes for ``GROUP`` 32, e4m3fn for
        16. ``TOKEN`` and ``ROW``:
    whether factors of tokens and of W divide the sum, as in NVFP4. ``WIDEN``: W is e2m1 and x e4m3, and
        Triton multiplies formats
    that differ on a 16-bit unit: W becomes e4m3 first.
    """
    first_token, first_row = place(M, N, BM, BN)
    token = first_token + tl.arange(0, BM)
    row = first_row + tl.arange(0, BN)
    BX: tl.constexpr = BK // 2 if X == "e2m1" else BK
    BW: tl.constexpr = BK // 2 if W == "e2m1" else BK
    BS: tl.constexpr = BK // GROUP
    steps = tl.cdiv(tl.cdiv(K, BK), SPLIT)
    total = tl.zeros((BN, BM), tl.float32)
    for step in range(tl.program_id(1) * steps, tl.minimum(tl.program_id(1) * steps + steps, tl.cdiv(K, BK))):
        left = rows_of(codes, row, row < N, step * BW, units, BW)
        left_scale = rows_of(scale, row, row < N, step * BS, groups, BS)
        right = rows_of(x, token, token < M, step * BX, width, BX)
        right_scale = rows_of(x_scale, token, token < M, step * BS, groups, BS)
        if WIDEN:
            left = widened(left, BN, BK)
        total = tl.dot_scaled(left, left_scale, X if WIDEN else W, tl.trans(right), right_scale, X, total)
    if WIDEN:
        total *= 64
    token = token[None, :]
    row = row[:, None]
    if SPLIT == 1:
        finish(total, of_token, of_row, bias, y, token, row, M, N, TOKEN, ROW, True, BIAS)
    else:
        part = y + tl.program_id(1).to(tl.int64) * M * N
        tl.store(part + token * N + row, total, mask=(token < M) & (row < N))
