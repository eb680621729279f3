"""Quantizes to GGUF's q4_k and q5_k, as ``numerics.kquants`` does.

A super-block is 256 values in 8 blocks of 32 with 6-bit scales and offsets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import literally, njit
from numba.core import types

from quantport.backend import once
from quantport_cpu.jit.encode import largest_magnitude
from quantport_cpu.jit.least_squares import INFINITY_BITS, clamp_and_round, solver, widen_with_range
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import (
    as_bits,
    as_float,
    clear_by_16,
    copy_bytes,
    load_uint8,
    load_uint32,
    store_uint8,
    store_uint16,
    store_uint32,
    words,
)
from quantport_cpu.jit.simd import F16, F32, I8, I16, I32, I64, Simd, Value, inline

SUPER_BLOCK, BLOCK, BLOCKS = 256, 32, 8
BYTES = {"q4_k": 144, "q5_k": 176}
_SHIFT = np.float32(1.5 * 2.0**23)
_solve_4, _solve_5 = solver(BLOCK, 15), solver(BLOCK, 31)


@inline(types.int64)
def fp16_bits(simd: Simd, value: Value) -> Value:
    """fp32 rounded to fp16, as its bits."""
    return simd.b.zext(simd.b.bitcast(simd.b.fptrunc(value, F16), I16), I64)


@inline(types.float32)
def fp16_value(simd: Simd, bits: Value) -> Value:
    """fp16 bits as fp32."""
    return simd.b.fpext(simd.b.bitcast(simd.b.trunc(bits, I16), F16), F32)


@inline(types.void, 4)
def encode_block(simd: Simd, source: Value, to: Value, low: Value, step: Value, n_top: int) -> None:
    """Codes 0..top of 32 bf16, a byte each: ``(x + low) / step``, and 0 where the step is 0."""
    x = simd.b.fadd(simd.load_bf16(BLOCK, source), simd.splat(low, BLOCK))
    q = clamp_and_round(simd, simd.b.fdiv(x, simd.splat(step, BLOCK)), 0.0, float(n_top))
    q = simd.b.select(simd.b.fcmp_ordered("==", step, F32(0.0)), simd.splat(0.0, BLOCK, F32), q)
    simd.store(simd.narrow(simd.b.fptosi(q, simd.bitcast(q, I32).type), I8), to)


@inline(types.void, 2)
def pack_codes(simd: Simd, codes: Value, to: Value, n_high: int) -> None:
    """Packs eight blocks of codes: two blocks to 32 bytes of nibbles, after the fifth bits if ``n_high``."""
    blocks = [simd.load(I8, BLOCK, simd.at(codes, BLOCK * i)) for i in range(BLOCKS)]
    if n_high:
        bits = simd.splat(0, BLOCK, I8)
        for i, block in enumerate(blocks):
            bits = simd.b.or_(bits, simd.int_op("shl", simd.int_op("lshr", block, 4), i))
        simd.store(bits, to)
    for i in range(0, BLOCKS, 2):
        pair = simd.b.or_(simd.int_op("and_", blocks[i], 15), simd.int_op("shl", blocks[i + 1], 4))
        simd.store(pair, simd.at(to, BLOCK * n_high + BLOCK * (i // 2)))


@njit(error_model="numpy")
def _six_bit_quotient(value, divisor):
    """Nearest 6-bit integer of a quotient; 0 where the divisor is 0."""
    if divisor == np.float32(0):
        return 0
    quotient = min(max(value / divisor, np.float32(0)), np.float32(63))
    return np.int64((quotient + _SHIFT) - _SHIFT)


@njit(error_model="numpy")
def _pack_scales(sc, m, to):
    for i in range(4):
        store_uint8(to + i, load_uint8(sc + i) | (load_uint8(sc + 4 + i) >> 4) << 6)
        store_uint8(to + 4 + i, load_uint8(m + i) | (load_uint8(m + 4 + i) >> 4) << 6)
        store_uint8(to + 8 + i, (load_uint8(sc + 4 + i) & 15) | (load_uint8(m + 4 + i) & 15) << 4)


@njit(error_model="numpy")
def _quantize_super_block(source, to, trials, work, n_top):
    """Quantizes one super-block.

    ``work``: 16 bytes, 8 scales, 8 offsets, 16 6-bit numbers, 32 fp32 from 128 on, 256 codes from 256 on.
    """
    n_top = literally(n_top)
    scales, offsets, x, six, codes = work + 16, work + 48, work + 128, work + 80, work + 256
    top_scale, top_offset = np.float32(0), np.float32(0)
    for i in range(BLOCKS):
        widen_with_range(source + 2 * BLOCK * i, x, work, BLOCK)
        low, high = min(as_float(load_uint32(work, 0)), np.float32(0)), as_float(load_uint32(work, 1))
        scale, zero = (
            _solve_4(x, low, high, trials, work) if n_top == 15 else _solve_5(x, low, high, trials, work)
        )
        scale, least = max(scale, np.float32(0)), max(-zero, np.float32(0))
        store_uint32(scales, i, as_bits(scale))
        store_uint32(offsets, i, as_bits(least))
        top_scale, top_offset = max(top_scale, scale), max(top_offset, least)
    d, low_d = fp16_bits(top_scale / np.float32(63)), fp16_bits(top_offset / np.float32(63))
    if largest_magnitude(source, SUPER_BLOCK) << 16 >= INFINITY_BITS:
        d, low_d = 0x7E00, 0x7E00
    if d == 0:
        low_d = 0
    store_uint16(to, 0, d)
    store_uint16(to, 1, low_d)
    for i in range(BLOCKS):
        sc = _six_bit_quotient(as_float(load_uint32(scales, i)), fp16_value(d))
        m = _six_bit_quotient(as_float(load_uint32(offsets, i)), fp16_value(low_d))
        store_uint8(six + i, sc)
        store_uint8(six + 8 + i, m)
        low, step = fp16_value(low_d) * np.float32(m), fp16_value(d) * np.float32(sc)
        encode_block(source + 2 * BLOCK * i, codes + BLOCK * i, low, step, n_top)
    _pack_scales(six, six + 8, to + 4)
    if n_top == 15:
        pack_codes(codes, to + 16, 0)
    else:
        pack_codes(codes, to + 16, 1)


def _body(n_top: int, size: int) -> Any:
    def rows(frame):
        source, source_stride, k, to, trials, work = words(frame, 2, 6)
        blocks, bounce = (k + SUPER_BLOCK - 1) // SUPER_BLOCK, work + 512
        while True:
            row = next_block(frame)
            if row >= block_count(frame):
                break
            for c in range(blocks):
                x, rest = source + row * source_stride + 2 * SUPER_BLOCK * c, k - SUPER_BLOCK * c
                if rest < SUPER_BLOCK:
                    clear_by_16(bounce, 2 * SUPER_BLOCK)
                    copy_bytes(bounce, x, 2 * rest)
                    x = bounce
                _quantize_super_block(x, to + (row * blocks + c) * size, trials, work, n_top)

    return rows


@once
def kernel(name: str) -> Kernel:
    """The kernel of one block type. Words: source, its stride, k, blocks, trials (fp32), 1 KiB."""
    return Kernel(_body({"q4_k": 15, "q5_k": 31}[name], BYTES[name]))
