"""Matrix multiplication of quantized activations and weights, ``y = x W^T (+ bias)``: e4m3fn times e4m3fn,
int8 times int8, and int8 times int4.

A program computes a tile ``[BM, BN]`` of y over one of ``SPLIT`` parts of K. Tiles are ordered so that
programs that run at the same time share rows of x and of W in the L2 cache. With few tokens W is the left
operand, since its rows fill the 64 or 128 rows of a matrix unit, and x the right one, where 16 tokens waste
nothing. Where there are few tiles, K is split and the parts are added in a fixed order. Scales of whole rows
are applied to the finished sum; those of groups along K to the partial product of each group, in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

# From this BM on, x is the left operand.
MIN_TOKENS_FOR_X_LEFT = tl.constexpr(64)
# Tiles of y are computed in bands of at most this many tiles of tokens, column by column, so that the tiles
# of a column share their tile of W in the L2 cache.
MAX_BAND_HEIGHT = tl.constexpr(8)


@triton.jit
def tile_origin(M, N, BM: tl.constexpr, BN: tl.constexpr):
    """First token and first row of W of a program's tile, int64. Axis 0 of the grid counts the tiles."""
    tile = tl.program_id(0)
    token_tiles = tl.cdiv(M, BM)
    tiles_per_band = tl.cdiv(N, BN) * MAX_BAND_HEIGHT
    first_tile = tile // tiles_per_band * MAX_BAND_HEIGHT
    band_height = tl.minimum(token_tiles - first_tile, MAX_BAND_HEIGHT)
    token = first_tile + tile % tiles_per_band % band_height
    return token.to(tl.int64) * BM, (tile % tiles_per_band // band_height).to(tl.int64) * BN


@triton.jit
def multiply_tile(
    left, right, total, BK: tl.constexpr, ACC: tl.constexpr, W_LEFT: tl.constexpr, FRESH: tl.constexpr
):
    """Multiplies x ``[BM, BK]`` and W ``[BN, BK]`` of one step along K: ``[BM, BN]``, or ``[BN, BM]`` where
    ``W_LEFT``.

    The matrix unit adds the product to ``total``. Where ``FRESH`` it does not: the caller adds outside of the
    matrix unit, and ``max_num_imprecise_acc`` keeps Triton from moving that addition back into it.
    """
    if W_LEFT:
        first = right
        second = tl.trans(left)
    else:
        first = left
        second = tl.trans(right)
    if FRESH:
        return tl.dot(first, second, out_dtype=ACC, max_num_imprecise_acc=BK if tl.float32 == ACC else 0)
    else:
        return tl.dot(first, second, total, out_dtype=ACC)


@triton.jit
def broadcast(token, row, W_LEFT: tl.constexpr):
    """Shapes a vector over tokens ``[BM]`` and one over rows of W ``[BN]`` to broadcast over a tile."""
    if W_LEFT:
        return token[None, :], row[:, None]
    else:
        return token[:, None], row[None, :]


@triton.jit
def unpack_int4(word, BN: tl.constexpr, BK: tl.constexpr):
    """Unpacks int4 codes from words ``[BN, BK / 8]`` to int8 ``[BN, BK]``, 16 times the code.

    A nibble is stored as code + 8. In the upper half of a byte, with its highest bit flipped, it is 16 times
    the code in two's complement: one instruction for four codes, without an addition. ``group_factor``
    divides by 16.
    """
    byte = (tl.arange(0, 4) * 8)[None, None, :]
    even = ((word << 4) & ~0x0F0F0F0F ^ ~0x7F7F7F7F)[:, :, None] >> byte
    odd = (word & ~0x0F0F0F0F ^ ~0x7F7F7F7F)[:, :, None] >> byte
    return tl.reshape(tl.join(even.to(tl.int8), odd.to(tl.int8)), (BN, BK))


@triton.jit
def load_factor(pointer, inside, DIVIDE: tl.constexpr):
    """Loads factors, or where ``DIVIDE`` their reciprocals, so that there is one division for a row or token
    and none for an output. ``div_rn``, since the fast division may flush to zero.
    """
    value = tl.load(pointer, mask=inside, other=1)
    return tl.div_rn(tl.full(value.shape, 1, tl.float32), value) if DIVIDE else value


@triton.jit
def store_output(
    total,
    token_factor,
    row_factor,
    bias,
    y,
    token,
    row,
    M,
    N,
    TOKEN_FACTOR: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Applies the factors of rows and tokens and the bias, and stores the output.

    The factor of the row comes first: with huge activations and tiny weights, the sum times the factor of the
    token alone could overflow.

    Args:
        total: Sums over K, of the shape of ``token + row``.
        token_factor: Pointer to factors of tokens, fp32 ``[M]``, where ``TOKEN_FACTOR``.
        row_factor: Pointer to factors of rows of W, fp32 ``[N]`` or ``[1]``, where ``ROW_STRIDE`` is not -1.
        bias: Pointer to ``[N]``, where ``BIAS``.
        y: Pointer to ``[M, N]``.
        token: Tokens, int64.
        row: Rows of W, int64.
        M: Tokens that exist.
        N: Rows that exist.
        TOKEN_FACTOR: Whether tokens have factors.
        ROW_STRIDE: 1 for a factor of each row of W, 0 for one of all, -1 for none.
        DIVIDE: Whether sums are divided by the factors, else multiplied.
        BIAS: Whether there is a bias.
    """
    total = total.to(tl.float32)
    if ROW_STRIDE >= 0:
        total *= load_factor(row_factor + row * ROW_STRIDE, row < N, DIVIDE)
    if TOKEN_FACTOR:
        total *= load_factor(token_factor + token, token < M, DIVIDE)
    if BIAS:
        total += tl.load(bias + row, mask=row < N, other=0).to(tl.float32)
    tl.store(y + token * N + row, total.to(y.dtype.element_ty), mask=(token < M) & (row < N))


@triton.jit
def gemm(
    x,
    token_factor,
    codes,
    row_factor,
    bias,
    y,
    M,
    N,
    K,
    w_width,
    groups_per_row,
    token_step,
    group_step,
    GROUP: tl.constexpr,
    TOKEN_FACTOR: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BIAS: tl.constexpr,
    PROMOTE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Computes one tile of y; with ``SPLIT > 1`` of one part of ``[SPLIT, M, N]``, which ``add`` sums.

    Grid: ``(cdiv(M, BM) * cdiv(N, BN), SPLIT)``.

    Args:
        x: Codes ``[M, K]``, e4m3fn or int8.
        token_factor: Scales of the activations, fp32: of tokens ``[M]`` where ``TOKEN_FACTOR``, else of
            groups ``[M, groups_per_row]`` with any strides.
        codes: Codes of W: ``[N, K]`` in the dtype of x, or int4 packed in words, int32 ``[N, w_width]``.
        row_factor: Scales of W. Without ``GROUP`` as for ``store_output``. With it, of groups 1 x 128, bf16
            ``[N, groups_per_row]``, where ``TOKEN_FACTOR``; else of blocks 128 x 128, fp32
            ``[cdiv(N, 128), groups_per_row]``.
        bias: As for ``store_output``.
        y: The output, or its parts: int32 for sums of int8 without groups, else fp32.
        M: Tokens.
        N: Rows of W.
        K: Columns of both.
        w_width: Elements in a row of ``codes``.
        groups_per_row: Groups along K.
        token_step: Stride of ``token_factor`` over tokens, where it has groups.
        group_step: Stride of ``token_factor`` over groups, where it has groups.
        GROUP: Columns of a group: 128, equal to ``BK``; or 0 where whole rows and tokens have scales.
        TOKEN_FACTOR: Whether a whole token has one scale.
        ROW_STRIDE: As for ``store_output``.
        BIAS: As for ``store_output``.
        PROMOTE: Whether the sums over ``BK`` are added outside of the matrix unit, since that of Ada and
            Hopper keeps 13 bits of mantissa in sums of e4m3fn (SageAttention2, arXiv 2411.10958; DeepSeek-V3,
            arXiv 2412.19437, section 3.3.2).
        BM: Tokens of a tile.
        BN: Rows of W of a tile.
        BK: Columns of a step.
        SPLIT: Parts of K.
    """
    INT: tl.constexpr = x.dtype.element_ty == tl.int8
    ACC: tl.constexpr = tl.int32 if INT else tl.float32
    SUM: tl.constexpr = tl.float32 if GROUP else ACC
    PER_WORD: tl.constexpr = 8 if codes.dtype.element_ty == tl.int32 else 1
    # Always for int4: a thread then has few rows of W, and so few of their scales.
    W_LEFT: tl.constexpr = BM < MIN_TOKENS_FOR_X_LEFT or PER_WORD == 8
    # One scale of 128 x 128 covers a whole tile of W.
    tl.static_assert(GROUP == 0 or (GROUP == BK and GROUP % BN == 0))
    first_token, first_row = tile_origin(M, N, BM, BN)
    token = first_token + tl.arange(0, BM)
    row = first_row + tl.arange(0, BN)
    steps = tl.cdiv(tl.cdiv(K, BK), SPLIT)
    total = tl.zeros((BN, BM) if W_LEFT else (BM, BN), SUM)
    for step in range(tl.program_id(1) * steps, tl.minimum(tl.program_id(1) * steps + steps, tl.cdiv(K, BK))):
        k = step * BK + tl.arange(0, BK)
        unit = step * (BK // PER_WORD) + tl.arange(0, BK // PER_WORD)
        left = tl.load(
            x + token[:, None] * K + k[None, :], mask=(token < M)[:, None] & (k < K)[None, :], other=0.0
        )
        right = tl.load(
            codes + row[:, None] * w_width + unit[None, :],
            mask=(row < N)[:, None] & (unit < w_width)[None, :],
            other=0.0,
        )
        if PER_WORD == 8:
            right = unpack_int4(right, BN, BK)
        if GROUP:
            part = multiply_tile(left, right, total, BK, ACC, W_LEFT, True)
            # The sum is below 2**22 and fits the mantissa of 1.5 * 2**23, which is faster than a conversion.
            if INT:
                part = (part + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
            scales = token_factor + (token * token_step + step * group_step)
            total += part * group_factor(
                scales,
                row_factor,
                token,
                row,
                first_row,
                step,
                M,
                N,
                groups_per_row,
                TOKEN_FACTOR,
                GROUP,
                W_LEFT,
            )
        elif PROMOTE:
            total += multiply_tile(left, right, total, BK, ACC, W_LEFT, True)
        else:
            total = multiply_tile(left, right, total, BK, ACC, W_LEFT, False)
    token, row = broadcast(token, row, W_LEFT)
    if SPLIT == 1:
        store_output(
            total, token_factor, row_factor, bias, y, token, row, M, N, TOKEN_FACTOR, ROW_STRIDE, False, BIAS
        )
    else:
        part = y + tl.program_id(1).to(tl.int64) * M * N
        tl.store(part + token * N + row, total, mask=(token < M) & (row < N))


@triton.jit
def group_factor(
    scales,
    row_factor,
    token,
    row,
    first_row,
    step,
    M,
    N,
    groups_per_row,
    TOKEN_FACTOR: tl.constexpr,
    GROUP: tl.constexpr,
    W_LEFT: tl.constexpr,
):
    """Factors of the partial products of one group along K: fp32, broadcastable over a tile.

    ``scales`` are pointers to the scales of the tokens in this group.
    """
    if TOKEN_FACTOR:
        weight = tl.load(row_factor + row * groups_per_row + step, mask=row < N, other=0).to(tl.float32)
        return broadcast(token, weight * 0.0625, W_LEFT)[1]  # unpack_int4 multiplies by 16
    else:
        tile = tl.load(row_factor + first_row // GROUP * groups_per_row + step)
        tokens = tl.load(scales, mask=token < M, other=0)
        return broadcast(tokens * tile, row, W_LEFT)[0]


@triton.jit
def add(
    parts,
    token_factor,
    row_factor,
    bias,
    y,
    M,
    N,
    TOKEN_FACTOR: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
):
    """Adds the parts of ``gemm``, first to last, so that each call gives the same bits, and stores the
    output.

    Grid: ``(cdiv(N, BN), M)``.
    """
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BN,), parts.dtype.element_ty)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + (part * M + token) * N + row, mask=row < N, other=0)
    store_output(
        total, token_factor, row_factor, bias, y, token, row, M, N, TOKEN_FACTOR, ROW_STRIDE, DIVIDE, BIAS
    )
