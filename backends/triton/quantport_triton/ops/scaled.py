"""Multiplication of quantized activations with quantized weights, ``y = x W^T (+ bias)``: e4m3fn, int8, and
int4 times int8.

A program computes a tile ``[BM, BN]`` of y, over a ``SPLIT``-th of K. Tiles are ordered so that programs that
run side by side share rows of x and of W, which the L2 cache then reads once. With few tokens W is the left
operand, whose rows fill the 64 or 128 rows that matrix units want, and x the right one, so that 16 tokens
waste nothing; where few tiles exist, K is split and the parts are added in a fixed order. Scales of whole
rows wait until the sum is done; those of groups along K multiply the partial product of each group, in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

WIDE = tl.constexpr(64)  # tiles of so many tokens have x as their left operand
ORDER = tl.constexpr(
    8
)  # tiles of tokens that share a tile of W are computed one after another, so many of them


@triton.jit
def place(M, N, BM: tl.constexpr, BN: tl.constexpr):
    """First token and first row of W of a program's tile: int64. Axis 0 of the grid counts the tiles."""
    number = tl.program_id(0)
    down = tl.cdiv(M, BM)
    wide = tl.cdiv(N, BN) * ORDER
    first = number // wide * ORDER
    height = tl.minimum(down - first, ORDER)
    token = first + number % wide % height
    return token.to(tl.int64) * BM, (number % wide // height).to(tl.int64) * BN


@triton.jit
def product(left, right, total, BK: tl.constexpr, ACC: tl.constexpr, FLIP: tl.constexpr, FRESH: tl.constexpr):
    """Product of x ``[BM, BK]`` and W ``[BN, BK]`` over one step along K: ``[BM, BN]``, or ``[BN, BM]`` with
    ``FLIP``.

    The matrix unit adds it to ``total``. Not where ``FRESH``: there the caller adds, outside of the
        matrix unit, and the limit
    of imprecise sums keeps Triton from moving that addition back into it.
    """
    if FLIP:
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
def across(token, row, FLIP: tl.constexpr):
    """Something of each token ``[BM]`` and something of each row ``[BN]``, shaped as ``product`` is."""
    if FLIP:
        return token[None, :], row[:, None]
    else:
        return token[:, None], row[None, :]


@triton.jit
def unpacked(word, BN: tl.constexpr, BK: tl.constexpr):
    """int4 codes of words ``[BN, BK / 8]``, times 16: int8 ``[BN, BK]``.

    A nibble is stored as code + 8. In the high half of a byte, with its highest bit flipped, it is 16 times
    the code in two's complement: four codes take one instruction, and no addition. ``group_factor`` divides
    by 16.
    """
    byte = (tl.arange(0, 4) * 8)[None, None, :]
    even = ((word << 4) & ~0x0F0F0F0F ^ ~0x7F7F7F7F)[:, :, None] >> byte
    odd = (word & ~0x0F0F0F0F ^ ~0x7F7F7F7F)[:, :, None] >> byte
    return tl.reshape(tl.join(even.to(tl.int8), odd.to(tl.int8)), (BN, BK))


@triton.jit
def factor(place, inside, DIVIDE: tl.constexpr):
    """Factors, or one over each: one division for a row, not for each output. ``div_rn``, since the fast one
    may flush to zero.
    """
    value = tl.load(place, mask=inside, other=1)
    return tl.div_rn(tl.full(value.shape, 1, tl.float32), value) if DIVIDE else value


@triton.jit
def finish(
    total,
    of_token,
    of_row,
    bias,
    y,
    token,
    row,
    M,
    N,
    TOKEN: tl.constexpr,
    ROW: tl.constexpr,
    DIVIDE: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Factors of whole rows and tokens, then bias, then the store. ``total`` has the shape of ``token +
    row``.

    The factor of the row comes first: where activations are huge and weights tiny, the product of both is
        in range, and that of
    activations alone is not.

    Args:
        total: Sums over K.
        of_token: Pointer to factors of tokens, fp32 ``[M]``, where ``TOKEN``.
        of_row: Pointer to factors of rows of W, fp32: ``[N]`` where ``ROW`` is 1, ``[1]`` where it is 0;
            -1: there are none.
        bias: Pointer to ``[N]``, where ``BIAS``.
        y: Pointer to ``[M, N]``.
        token: Tokens, int64.
        row: Rows of W, int64.
        M: Tokens that exist.
        N: Rows that exist.
        TOKEN: Whether tokens have factors.
        ROW: Whether rows have.
        DIVIDE: Whether sums are divided by the factors.
        BIAS: Whether there is a bias.
    """
    total = total.to(tl.float32)
    if ROW >= 0:
        total *= factor(of_row + row * ROW, row < N, DIVIDE)
    if TOKEN:
        total *= factor(of_token + token, token < M, DIVIDE)
    if BIAS:
        total += tl.load(bias + row, mask=row < N, other=0).to(tl.float32)
    tl.store(y + token * N + row, total.to(y.dtype.element_ty), mask=(token < M) & (row < N))


@triton.jit
def gemm(
    x,
    of_token,
    codes,
    of_row,
    bias,
    y,
    M,
    N,
    K,
    units,
    groups,
    token_step,
    group_step,
    GROUP: tl.constexpr,
    TOKEN: tl.constexpr,
    ROW: tl.constexpr,
    BIAS: tl.constexpr,
    PROMOTE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One tile of y, or of one of its ``SPLIT`` parts ``[SPLIT, M, N]``, which ``add`` finishes.

    Grid: ``(cdiv(M, BM) * cdiv(N, BN), SPLIT)``.

    Args:
        x: Codes ``[M, K]``, e4m3fn or int8.
        of_token: Scales of tokens, fp32 ``[M]``; of groups of tokens ``[M, groups]`` of any strides where
            there is no ``TOKEN``.
        codes: Codes of W: ``[N, K]`` as those of x, or int4 in words, int32 ``[N, units]``.
        of_row: Scales of W, fp32: as for ``finish``; with ``GROUP``, those of 1 x 128, bf16 ``[N, groups]``,
            where ``TOKEN``, else of 128 x 128, fp32 ``[cdiv(N, 128), groups]``.
        bias: As for ``finish``.
        y: The output, or its parts: int32 for sums of int8, else fp32.
        M: Tokens.
        N: Rows of W.
        K: Columns of both.
        units: Width of a row of ``codes``.
        groups: Groups along K.
        token_step: Stride of scales of groups of tokens from one token to the next.
        group_step: And from one group to the next.
        GROUP: 128, which ``BK`` must be too, or 0: only rows and tokens have scales.
        TOKEN: Whether there is a scale for each whole token.
        ROW: As for ``finish``.
        BIAS: As for ``finish``.
        PROMOTE: Whether sums over ``BK`` are added outside of the matrix unit: that of Ada and Hopper keeps
            13 bits of mantissa in sums of e4m3fn (SageAttention2, arXiv 2411.10958; DeepSeek-V3, arXiv
            2412.19437, section 3.3.2).
        BM: Tokens of a tile.
        BN: Rows of W of a tile.
        BK: Columns of a step.
        SPLIT: Parts of K.
    """
    INT: tl.constexpr = x.dtype.element_ty == tl.int8
    ACC: tl.constexpr = tl.int32 if INT else tl.float32
    SUM: tl.constexpr = tl.float32 if GROUP else ACC
    PER: tl.constexpr = 8 if codes.dtype.element_ty == tl.int32 else 1
    FLIP: tl.constexpr = (
        BM < WIDE or PER == 8
    )  # int4 always: a thread then holds few rows of W, and few of their scales
    tl.static_assert(
        GROUP == 0 or (GROUP == BK and GROUP % BN == 0)
    )  # one scale of 128 x 128 for a whole tile of W
    first_token, first_row = place(M, N, BM, BN)
    token = first_token + tl.arange(0, BM)
    row = first_row + tl.arange(0, BN)
    steps = tl.cdiv(tl.cdiv(K, BK), SPLIT)
    total = tl.zeros((BN, BM) if FLIP else (BM, BN), SUM)
    for step in range(tl.program_id(1) * steps, tl.minimum(tl.program_id(1) * steps + steps, tl.cdiv(K, BK))):
        k = step * BK + tl.arange(0, BK)
        unit = step * (BK // PER) + tl.arange(0, BK // PER)
        left = tl.load(
            x + token[:, None] * K + k[None, :], mask=(token < M)[:, None] & (k < K)[None, :], other=0.0
        )
        right = tl.load(
            codes + row[:, None] * units + unit[None, :],
            mask=(row < N)[:, None] & (unit < units)[None, :],
            other=0.0,
        )
        if PER == 8:
            right = unpacked(right, BN, BK)
        if GROUP:
            part = product(left, right, total, BK, ACC, FLIP, True)
            # a sum below 2**22 in the mantissa of 1.5 * 2**23: no conversion unit is needed, which is slower
            if INT:
                part = (part + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
            scales = of_token + (token * token_step + step * group_step)
            total += part * group_factor(
                scales, of_row, token, row, first_row, step, M, N, groups, TOKEN, GROUP, FLIP
            )
        elif PROMOTE:
            total += product(left, right, total, BK, ACC, FLIP, True)
        else:
            total = product(left, right, total, BK, ACC, FLIP, False)
    token, row = across(token, row, FLIP)
    if SPLIT == 1:
        finish(total, of_token, of_row, bias, y, token, row, M, N, TOKEN, ROW, False, BIAS)
    else:
        part = y + tl.program_id(1).to(tl.int64) * M * N
        tl.store(part + token * N + row, total, mask=(token < M) & (row < N))


@triton.jit
def group_factor(
    scales,
    of_row,
    token,
    row,
    first_row,
    step,
    M,
    N,
    groups,
    TOKEN: tl.constexpr,
    GROUP: tl.constexpr,
    FLIP: tl.constexpr,
):
    """Scales of one group along K: fp32, broadcastable with ``product``. ``scales`` points to those of
    tokens.
    """
    if TOKEN:
        weight = tl.load(of_row + row * groups + step, mask=row < N, other=0).to(tl.float32)
        return across(token, weight * 0.0625, FLIP)[1]  # of codes that are ``unpacked`` times 16
    else:
        tile = tl.load(of_row + first_row // GROUP * groups + step)
        tokens = tl.load(scales, mask=token < M, other=0)
        return across(tokens * tile, row, FLIP)[0]


@triton.jit
def add(
    parts,
    of_token,
    of_row,
    bias,
    y,
    M,
    N,
    TOKEN: tl.constexpr,
    ROW: tl.constexpr,
    DIVIDE: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
):
    """Adds the parts of ``gemm``, first to last: the same bits at every call. Grid: ``(cdiv(N, BN), M)``."""
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BN,), parts.dtype.element_ty)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + (part * M + token) * N + row, mask=row < N, other=0)
    finish(total, of_token, of_row, bias, y, token, row, M, N, TOKEN, ROW, DIVIDE, BIAS)
