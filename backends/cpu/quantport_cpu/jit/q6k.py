"""Quantizes to GGUF's q6_k, as ``numerics.kquants.quantize_q6_k`` does.

A super-block is 256 values in 16 blocks of 16 with 8-bit scales.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.core import types

from quantport_cpu.jit.encode import largest_magnitude
from quantport_cpu.jit.gguf import first_largest
from quantport_cpu.jit.kquants import fp16_bits, fp16_value
from quantport_cpu.jit.least_squares import INFINITY_BITS, clamp_and_round
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import (
    as_bits,
    as_float,
    clear_by_16,
    copy_bytes,
    load_uint32,
    store_uint8,
    store_uint16,
    store_uint32,
    words,
)
from quantport_cpu.jit.simd import F32, I8, I32, Simd, Value, inline

SUPER_BLOCK, BLOCK, BLOCKS, BYTES = 256, 16, 16, 210
_FACTORS = tuple(np.float32(f) for f in (1.0, 0.95, 0.9, 0.85, 0.8, 1.05))
_SHIFT = np.float32(1.5 * 2.0**23)


@inline(types.float32)
def largest_with_sign(simd: Simd, source: Value) -> Value:
    """The first of the largest of 16 bf16, with its sign."""
    return first_largest(simd, source, BLOCK)


def _round_codes(simd: Simd, x: Value, step: Value) -> Value:
    q = clamp_and_round(simd, simd.b.fdiv(x, simd.splat(step, BLOCK)), -32.0, 31.0)
    return simd.b.select(simd.b.fcmp_ordered("==", step, F32(0.0)), simd.splat(0.0, BLOCK, F32), q)


@inline(types.void)
def code_sums(simd: Simd, source: Value, step: Value, to: Value) -> None:
    """Sums over the codes q of 16 bf16, two fp32: of q * x and of q * q."""
    x = simd.load_bf16(BLOCK, source)
    q = _round_codes(simd, x, step)
    for i, v in enumerate((simd.b.fmul(q, x), simd.b.fmul(q, q))):
        simd.store(simd.reduce_lanes(v), simd.at(to, 4 * i))


@inline(types.void)
def encode_block(simd: Simd, source: Value, step: Value, to: Value) -> None:
    """Codes + 32 of 16 bf16, a byte each."""
    q = _round_codes(simd, simd.load_bf16(BLOCK, source), step)
    rounded = simd.int_op("add", simd.b.fptosi(q, simd.bitcast(q, I32).type), 32)
    simd.store(simd.narrow(rounded, I8), to)


@inline(types.void)
def pack_codes(simd: Simd, source: Value, to: Value) -> None:
    """256 codes to 128 bytes of low nibbles and 64 bytes of high pairs."""
    for half in (0, 1):
        runs = [simd.load(I8, 32, simd.at(source, 128 * half + 32 * i)) for i in range(4)]
        for i in (0, 1):
            pair = simd.b.or_(simd.int_op("and_", runs[i], 15), simd.int_op("shl", runs[i + 2], 4))
            simd.store(pair, simd.at(to, 64 * half + 32 * i))
        high = simd.int_op("lshr", runs[0], 4)
        for i in (1, 2, 3):
            high = simd.b.or_(high, simd.int_op("shl", simd.int_op("lshr", runs[i], 4), 2 * i))
        simd.store(high, simd.at(to, 128 + 32 * half))


@njit(error_model="numpy")
def _scale(source, work):
    """The scale of 16 bf16: of those tried, fitted by least squares, the one of least error."""
    top, zero = largest_with_sign(source), np.float32(0)
    best, scale = zero, zero
    for factor in _FACTORS:
        code_sums(source, top * factor / np.float32(-32), work)
        qx, qq = as_float(load_uint32(work, 0)), as_float(load_uint32(work, 1))
        if qq != zero:
            explained = qx * qx / qq
            if explained > best:
                best, scale = explained, qx / qq
    return scale


@njit(error_model="numpy")
def _quantize_super_block(source, to, work):
    """Quantizes one super-block. ``work``: 16 bytes, 16 fp32, 256 codes from 128 on."""
    top = np.float32(0)
    for i in range(BLOCKS):
        scale = _scale(source + 2 * BLOCK * i, work)
        store_uint32(work + 16, i, as_bits(scale))
        if abs(scale) > abs(top):
            top = scale
    d = fp16_bits(top / np.float32(-128))
    if largest_magnitude(source, SUPER_BLOCK) << 16 >= INFINITY_BITS:
        d = 0x7E00
    store_uint16(to, 104, d)
    unit = fp16_value(d)
    for i in range(BLOCKS):
        sc = np.float32(0)
        if unit != np.float32(0):
            sc = min(max(as_float(load_uint32(work + 16, i)) / unit, np.float32(-128)), np.float32(127))
            sc = (sc + _SHIFT) - _SHIFT
        store_uint8(to + 192 + i, np.int64(sc))
        encode_block(source + 2 * BLOCK * i, unit * sc, work + 128 + BLOCK * i)
    pack_codes(work + 128, to)


def _rows(frame):
    """A block is a row. Words: source, its stride, k, blocks, 1 KiB.

    ``kquants`` and ``gguf`` have this loop too. A body for all three would capture the function of a block,
    and bodies capture nothing but numbers (``store.captured``).
    """
    source, source_stride, k, to, work = words(frame, 2, 5)
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
            _quantize_super_block(x, to + (row * blocks + c) * BYTES, work)


kernel = Kernel(_rows)
