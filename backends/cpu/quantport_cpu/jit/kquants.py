"""GGUF's q4_k and q5_k: super-blocks of 256 BF16 in 8 blocks of 32 with 6-bit scales and offsets, as
``numerics.kquants``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import literally, njit
from numba.core import types

from quantport.backend import once
from quantport_cpu.jit.emit import F16, F32, I8, I16, I32, I64, Simd, Value, inline
from quantport_cpu.jit.encode import bits32, f32, get8, get32, magnitude, put8, put16, put32
from quantport_cpu.jit.frame import Kernel, take, word
from quantport_cpu.jit.grid import INFINITE, solver, spread, whole
from quantport_cpu.jit.repack import move, wipe
from quantport_cpu.jit.small import floats

SUPER, SUB, COUNT = 256, 32, 8
BYTES = {"q4_k": 144, "q5_k": 176}
_SHIFT = np.float32(1.5 * 2.0**23)
_solve_4, _solve_5 = solver(SUB, 15), solver(SUB, 31)


@inline(types.int64)
def half_bits(simd: Simd, value: Value) -> Value:
    """fp32 rounded to fp16, as its bits."""
    return simd.b.zext(simd.b.bitcast(simd.b.fptrunc(value, F16), I16), I64)


@inline(types.float32)
def half_value(simd: Simd, bits: Value) -> Value:
    """fp16 bits as fp32."""
    return simd.b.fpext(simd.b.bitcast(simd.b.trunc(bits, I16), F16), F32)


@inline(types.void, 4)
def sub_codes(simd: Simd, source: Value, to: Value, low: Value, step: Value, n_top: int) -> None:
    """Codes 0..top of 32 bf16, a byte each: ``(x + low) / step``, and 0 where the step is 0."""
    x = simd.b.fadd(floats(simd, source, SUB), simd.splat(low, SUB))
    q = whole(simd, simd.b.fdiv(x, simd.splat(step, SUB)), 0.0, float(n_top))
    q = simd.b.select(simd.b.fcmp_ordered("==", step, F32(0.0)), simd.splat(0.0, SUB, F32), q)
    simd.store(simd.narrow(simd.b.fptosi(q, simd.bits(q, I32).type), I8), to)


@inline(types.void, 2)
def pack_codes(simd: Simd, codes: Value, to: Value, n_high: int) -> None:
    """Eight blocks of codes to nibbles, two blocks to 32 bytes; before them, where codes have one, the fifth
    bits.
    """
    blocks = [simd.load(I8, SUB, simd.at(codes, SUB * i)) for i in range(COUNT)]
    if n_high:
        bits = simd.splat(0, SUB, I8)
        for i, block in enumerate(blocks):
            bits = simd.b.or_(bits, simd.integer("shl", simd.integer("lshr", block, 4), i))
        simd.store(bits, to)
    for i in range(0, COUNT, 2):
        pair = simd.b.or_(simd.integer("and_", blocks[i], 15), simd.integer("shl", blocks[i + 1], 4))
        simd.store(pair, simd.at(to, SUB * n_high + SUB * (i // 2)))


@njit(error_model="numpy")
def _six_bits(value, by):
    """Nearest 6-bit integer of a quotient; 0 where the divisor is 0."""
    if by == np.float32(0):
        return 0
    quotient = min(max(value / by, np.float32(0)), np.float32(63))
    return np.int64((quotient + _SHIFT) - _SHIFT)


@njit(error_model="numpy")
def _pack_scales(sc, m, to):
    for i in range(4):
        put8(to + i, get8(sc + i) | (get8(sc + 4 + i) >> 4) << 6)
        put8(to + 4 + i, get8(m + i) | (get8(m + 4 + i) >> 4) << 6)
        put8(to + 8 + i, (get8(sc + 4 + i) & 15) | (get8(m + 4 + i) & 15) << 4)


@njit(error_model="numpy")
def _super(source, to, trials, work, n_top):
    """One super-block. ``work``: 16 bytes, 8 scales, 8 offsets, 32 fp32, 16 6-bit numbers, 256 codes."""
    n_top = literally(n_top)
    scales, offsets, x, six, codes = work + 16, work + 48, work + 128, work + 80, work + 256
    top_scale, top_offset = np.float32(0), np.float32(0)
    for i in range(COUNT):
        spread(source + 2 * SUB * i, x, work, SUB)
        low, high = min(f32(get32(work, 0)), np.float32(0)), f32(get32(work, 1))
        scale, zero = (
            _solve_4(x, low, high, trials, work) if n_top == 15 else _solve_5(x, low, high, trials, work)
        )
        scale, least = max(scale, np.float32(0)), max(-zero, np.float32(0))
        put32(scales, i, bits32(scale))
        put32(offsets, i, bits32(least))
        top_scale, top_offset = max(top_scale, scale), max(top_offset, least)
    d, low_d = half_bits(top_scale / np.float32(63)), half_bits(top_offset / np.float32(63))
    if magnitude(source, SUPER) << 16 >= INFINITE:
        d, low_d = 0x7E00, 0x7E00
    if d == 0:
        low_d = 0
    put16(to, 0, d)
    put16(to, 1, low_d)
    for i in range(COUNT):
        sc, m = (
            _six_bits(f32(get32(scales, i)), half_value(d)),
            _six_bits(f32(get32(offsets, i)), half_value(low_d)),
        )
        put8(six + i, sc)
        put8(six + 8 + i, m)
        low, step = half_value(low_d) * np.float32(m), half_value(d) * np.float32(sc)
        sub_codes(source + 2 * SUB * i, codes + SUB * i, low, step, n_top)
    _pack_scales(six, six + 8, to + 4)
    if n_top == 15:
        pack_codes(codes, to + 16, 0)
    else:
        pack_codes(codes, to + 16, 1)


def _body(n_top: int, size: int) -> Any:
    def rows(frame):
        source, source_stride, k, to = word(frame, 2), word(frame, 3), word(frame, 4), word(frame, 5)
        trials, work = word(frame, 6), word(frame, 7)
        blocks, bounce = (k + SUPER - 1) // SUPER, work + 512
        while True:
            row = take(frame)
            if row >= word(frame, 1):
                break
            for c in range(blocks):
                x, rest = source + row * source_stride + 2 * SUPER * c, k - SUPER * c
                if rest < SUPER:
                    wipe(bounce, 2 * SUPER)
                    move(bounce, x, 2 * rest)
                    x = bounce
                _super(x, to + (row * blocks + c) * size, trials, work, n_top)

    return rows


@once
def kernel(name: str) -> Kernel:
    """The kernel of one block type. Words: source, its stride, k, blocks, trials (fp32), 1 KiB."""
    return Kernel(_body({"q4_k": 15, "q5_k": 31}[name], BYTES[name]))
