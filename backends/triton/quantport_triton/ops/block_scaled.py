"""Matrix multiplication of MX and NVFP4 operands, ``y = x W^T (+ bias)``.

The matrix unit applies the block scales along K. A program computes a tile ``[BN, BM]`` of ``W x^T`` over
one of ``SPLIT`` parts of K. W is always the left operand: the matrix unit of data-center Blackwell needs 128
rows on the left, which weights have and a few tokens do not. Tile order, split K and epilogue are those of
``scaled``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantport_triton.ops.scaled import store_output, tile_origin


@triton.jit
def load_rows(codes, row, inside, first, width, COLUMNS: tl.constexpr):
    """Columns ``first`` to ``first + COLUMNS`` of rows that are ``width`` wide: ``[rows, COLUMNS]``.

    Elements outside of the matrix are 0.
    """
    column = first + tl.arange(0, COLUMNS)
    return tl.load(
        codes + row[:, None] * width + column[None, :],
        mask=inside[:, None] & (column < width)[None, :],
        other=0.0,
    )


@triton.jit
def e2m1_to_e4m3(pair, BN: tl.constexpr, BK: tl.constexpr):
    """Turns packed e2m1 codes, bytes ``[BN, BK / 2]``, into e4m3 ``[BN, BK]`` with 1/64 of the value.

    Sign, exponent and mantissa bits move to their places in e4m3. The exponent bias is 1 in e2m1 and 7 in
    e4m3, hence the factor ``2**-6``; it holds for subnormal numbers too.
    """
    even = (pair & 8) << 4 | (pair & 7) << 2
    odd = pair & 128 | pair >> 2 & 28
    return tl.reshape(tl.join(even, odd), (BN, BK))


@triton.jit
def gemm(
    x,
    x_scale,
    codes,
    scale,
    token_factor,
    row_factor,
    bias,
    y,
    M,
    N,
    K,
    x_width,
    w_width,
    groups_per_row,
    X_FORMAT: tl.constexpr,
    W_FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    TOKEN_FACTOR: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Computes one tile of y; with ``SPLIT > 1`` of one part of ``[SPLIT, M, N]``, which ``scaled.add`` sums.

    Grid: ``(cdiv(M, BM) * cdiv(N, BN), SPLIT)``.

    Args:
        x: Codes of the activations, bytes ``[M, x_width]``.
        x_scale: Their scales ``[M, groups_per_row]``: e8m0 as bytes where ``GROUP`` is 32, e4m3fn where it
            is 16.
        codes: Codes of W, bytes ``[N, w_width]``.
        scale: Their scales ``[N, groups_per_row]``, as ``x_scale``.
        token_factor: As for ``scaled.store_output``; the sum is divided by it, as in NVFP4.
        row_factor: As for ``scaled.store_output``; the sum is divided by it, as in NVFP4.
        bias: As for ``scaled.store_output``.
        y: The output, or its parts in fp32.
        M: Tokens.
        N: Rows of W.
        K: Columns of both.
        x_width: Bytes of a row of ``x``.
        w_width: Bytes of a row of ``codes``.
        groups_per_row: Scales of a row.
        X_FORMAT: ``e4m3`` or ``e2m1``.
        W_FORMAT: ``e4m3`` or ``e2m1``.
        GROUP: Columns that share a scale, 16 or 32.
        TOKEN_FACTOR: As for ``scaled.store_output``.
        ROW_STRIDE: As for ``scaled.store_output``.
        BIAS: As for ``scaled.store_output``.
        WIDEN: Whether e2m1 codes of W become e4m3 first, since x is e4m3 and Triton multiplies two different
            formats on the 16-bit unit.
        BM: Tokens of a tile.
        BN: Rows of W of a tile.
        BK: Columns of a step.
        SPLIT: Parts of K.
    """
    first_token, first_row = tile_origin(M, N, BM, BN)
    token = first_token + tl.arange(0, BM)
    row = first_row + tl.arange(0, BN)
    BX: tl.constexpr = BK // 2 if X_FORMAT == "e2m1" else BK
    BW: tl.constexpr = BK // 2 if W_FORMAT == "e2m1" else BK
    BS: tl.constexpr = BK // GROUP
    steps = tl.cdiv(tl.cdiv(K, BK), SPLIT)
    total = tl.zeros((BN, BM), tl.float32)
    for step in range(tl.program_id(1) * steps, tl.minimum(tl.program_id(1) * steps + steps, tl.cdiv(K, BK))):
        left = load_rows(codes, row, row < N, step * BW, w_width, BW)
        left_scale = load_rows(scale, row, row < N, step * BS, groups_per_row, BS)
        right = load_rows(x, token, token < M, step * BX, x_width, BX)
        right_scale = load_rows(x_scale, token, token < M, step * BS, groups_per_row, BS)
        if WIDEN:
            left = e2m1_to_e4m3(left, BN, BK)
        total = tl.dot_scaled(
            left, left_scale, X_FORMAT if WIDEN else W_FORMAT, tl.trans(right), right_scale, X_FORMAT, total
        )
    if WIDEN:
        total *= 64
    token = token[None, :]
    row = row[:, None]
    if SPLIT == 1:
        store_output(
            total, token_factor, row_factor, bias, y, token, row, M, N, TOKEN_FACTOR, ROW_STRIDE, True, BIAS
        )
    else:
        part = y + tl.program_id(1).to(tl.int64) * M * N
        tl.store(part + token * N + row, total, mask=(token < M) & (row < N))
