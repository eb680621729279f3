"""Quantization with a scale that spans rows: of square blocks, one to a program, and of a whole tensor."""

from __future__ import annotations

import triton
import triton.language as tl

from quantport_triton.ops.encode import codes_of, fp32, magnitude, scale_of
from quantport_triton.ops.quantize import put_codes


@triton.jit
def squares(
    x,
    codes,
    scale,
    N,
    K,
    stride,
    units,
    blocks,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    EVEN: tl.constexpr,
    SCALE: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BR: tl.constexpr,
    P: tl.constexpr,
):
    """A scale for each block of ``ROWS`` x ``GROUP``, a block per program. Grid: ``cdiv(N, ROWS) *
    blocks``.
    """
    program = tl.program_id(0)
    above = tl.arange(0, BR)
    row = (program // blocks).to(tl.int64) * ROWS + above
    row = tl.where(above < ROWS, row, N)
    start = program % blocks * GROUP + tl.zeros((1,), tl.int32)
    inner = tl.arange(0, P)[None, None, :]
    k = start[None, :, None] + inner
    inside = (row < N)[:, None, None] & (k < K) & (inner < GROUP)
    value = fp32(x, row[:, None, None] * stride + k, inside)
    stored, divisor = scale_of(tl.max(tl.max(tl.max(magnitude(value), 2), 1), 0), SCALE, HALF, 0, 0)
    tl.store(scale + program, stored.to(scale.dtype.element_ty))
    put_codes(
        codes, codes_of(value, divisor, FORMAT, SCALE), row, N, start, K, units, GROUP, BITS, BYTES, EVEN
    )


@triton.jit
def largest(x, top, size, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Bits of the largest magnitude of ``size`` elements, or what ``top`` ``[1]`` holds if that is more.

    Grid: ``cdiv(size, BLOCK * STEPS)``.
    """
    place = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    most = tl.zeros((BLOCK,), tl.int32)
    for _ in range(STEPS):
        most = tl.maximum(most, magnitude(fp32(x, place, place < size)))
        place += BLOCK
    tl.atomic_max(top, tl.max(most, 0), sem="relaxed")


@triton.jit
def whole(
    x,
    codes,
    scale,
    top,
    size,
    FORMAT: tl.constexpr,
    SCALE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """8-bit codes of ``size`` elements with one scale, which follows from ``top`` ``[1]``. Grid: ``cdiv(size,
    BLOCK)``.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    stored, divisor = scale_of(tl.load(top), SCALE, HALF, 0, 0)
    tl.store(scale, stored.to(scale.dtype.element_ty), mask=tl.program_id(0) == 0)
    code = codes_of(fp32(x, place, place < size), divisor, FORMAT, SCALE)
    tl.store(codes + place, code.to(tl.uint8), mask=place < size)
