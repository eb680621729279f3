"""Quantization with scales that span rows: of two-dimensional blocks, and of a whole tensor."""

from __future__ import annotations

import triton
import triton.language as tl

from quantport_triton.ops.encode import divide_and_encode, load_fp32, magnitude_bits, scale_and_divisor
from quantport_triton.ops.quantize import store_codes


@triton.jit
def squares(
    x,
    codes,
    scale,
    N,
    K,
    stride,
    words_per_row,
    groups_per_row,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
    SCALE: tl.constexpr,
    HALF_RANGE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BR: tl.constexpr,
    P: tl.constexpr,
):
    """Quantizes with a scale for each block ``ROWS`` x ``GROUP``, a block per program.

    Grid: ``cdiv(N, ROWS) * groups_per_row``.
    """
    program = tl.program_id(0)
    inner_row = tl.arange(0, BR)
    row = (program // groups_per_row).to(tl.int64) * ROWS + inner_row
    row = tl.where(inner_row < ROWS, row, N)
    start = program % groups_per_row * GROUP + tl.zeros((1,), tl.int32)
    inner = tl.arange(0, P)[None, None, :]
    k = start[None, :, None] + inner
    inside = (row < N)[:, None, None] & (k < K) & (inner < GROUP)
    value = load_fp32(x, row[:, None, None] * stride + k, inside)
    stored, divisor = scale_and_divisor(
        tl.max(tl.max(tl.max(magnitude_bits(value), 2), 1), 0), SCALE, HALF_RANGE, 0, 0
    )
    tl.store(scale + program, stored.to(scale.dtype.element_ty))
    store_codes(
        codes,
        divide_and_encode(value, divisor, FORMAT, SCALE),
        row,
        N,
        start,
        K,
        words_per_row,
        GROUP,
        BITS,
        BYTES,
        WHOLE_WORDS,
    )


@triton.jit
def largest(x, top, size, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Raises ``top`` ``[1]``, int32, to the bits of the largest magnitude of ``size`` elements.

    Grid: ``cdiv(size, BLOCK * STEPS)``.
    """
    place = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    largest_bits = tl.zeros((BLOCK,), tl.int32)
    for _ in range(STEPS):
        largest_bits = tl.maximum(largest_bits, magnitude_bits(load_fp32(x, place, place < size)))
        place += BLOCK
    tl.atomic_max(top, tl.max(largest_bits, 0), sem="relaxed")


@triton.jit
def whole(
    x,
    codes,
    scale,
    top,
    size,
    FORMAT: tl.constexpr,
    SCALE: tl.constexpr,
    HALF_RANGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantizes ``size`` elements to 8-bit codes with one scale.

    ``top`` ``[1]`` holds the bits of their largest magnitude. Grid: ``cdiv(size, BLOCK)``.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    stored, divisor = scale_and_divisor(tl.load(top), SCALE, HALF_RANGE, 0, 0)
    tl.store(scale, stored.to(scale.dtype.element_ty), mask=tl.program_id(0) == 0)
    code = divide_and_encode(load_fp32(x, place, place < size), divisor, FORMAT, SCALE)
    tl.store(codes + place, code.to(tl.uint8), mask=place < size)
