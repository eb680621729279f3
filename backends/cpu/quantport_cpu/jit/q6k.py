"""GGUF's q6_k: super-blocks of 256 BF16 in 16 blocks of 16 with 8-bit scales, as
``numerics.kquants.quantize_q6_k``.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.core import types

from quantport_cpu.jit.emit import F32, I8, I32, Simd, Value, inline
from quantport_cpu.jit.encode import bits32, f32, get32, magnitude, put8, put16, put32
from quantport_cpu.jit.frame import Kernel, take, word
from quantport_cpu.jit.gguf import first_largest
from quantport_cpu.jit.grid import INFINITE, whole
from quantport_cpu.jit.kquants import half_bits, half_value
from quantport_cpu.jit.repack import move, wipe
from quantport_cpu.jit.small import floats

SUPER, SUB, COUNT, BYTES = 256, 16, 16, 210
_FACTORS = tuple(np.float32(f) for f in (1.0, 0.95, 0.9, 0.85, 0.8, 1.05))
_SHIFT = np.float32(1.5 * 2.0**23)


@inline(types.float32)
def extreme(simd: Simd, source: Value) -> Value:
    """The first of the largest of 16 bf16, with its sign."""
    return first_largest(simd, source, SUB)


def _codes(simd: Simd, x: Value, step: Value) -> Value:
    q = whole(simd, simd.b.fdiv(x, simd.splat(step, SUB)), -32.0, 31.0)
    return simd.b.select(simd.b.fcmp_ordered("==", step, F32(0.0)), simd.splat(0.0, SUB, F32), q)


@inline(types.void)
def fit(simd: Simd, source: Value, step: Value, to: Value) -> None:
    """Sums over the codes q of 16 bf16, two fp32: of q * x and of q * q."""
    x = floats(simd, source, SUB)
    q = _codes(simd, x, step)
    for i, v in enumerate((simd.b.fmul(q, x), simd.b.fmul(q, q))):
        simd.store(simd.total(v), simd.at(to, 4 * i))


@inline(types.void)
def codes(simd: Simd, source: Value, step: Value, to: Value) -> None:
    """Codes + 32 of 16 bf16, a byte each."""
    q = _codes(simd, floats(simd, source, SUB), step)
    whole_ = simd.integer("add", simd.b.fptosi(q, simd.bits(q, I32).type), 32)
    simd.store(simd.narrow(whole_, I8), to)


@inline(types.void)
def pack(simd: Simd, source: Value, to: Value) -> None:
    """256 codes to 128 bytes of low nibbles and 64 bytes of high pairs."""
    for half in (0, 1):
        runs = [simd.load(I8, 32, simd.at(source, 128 * half + 32 * i)) for i in range(4)]
        for i in (0, 1):
            pair = simd.b.or_(simd.integer("and_", runs[i], 15), simd.integer("shl", runs[i + 2], 4))
            simd.store(pair, simd.at(to, 64 * half + 32 * i))
        high = simd.integer("lshr", runs[0], 4)
        for i in (1, 2, 3):
            high = simd.b.or_(high, simd.integer("shl", simd.integer("lshr", runs[i], 4), 2 * i))
        simd.store(high, simd.at(to, 128 + 32 * half))


@njit(error_model="numpy")
def _scale(source, work):
    """Scale of 16 bf16: the one of the tried ones that explains most, fitted."""
    top, zero = extreme(source), np.float32(0)
    best, scale = zero, zero
    for factor in _FACTORS:
        fit(source, top * factor / np.float32(-32), work)
        qx, qq = f32(get32(work, 0)), f32(get32(work, 1))
        if qq != zero:
            explained = qx * qx / qq
            if explained > best:
                best, scale = explained, qx / qq
    return scale


@njit(error_model="numpy")
def _super(source, to, work):
    """One super-block. ``work``: 16 bytes, 16 fp32, 256 codes from 128 on."""
    top = np.float32(0)
    for i in range(COUNT):
        scale = _scale(source + 2 * SUB * i, work)
        put32(work + 16, i, bits32(scale))
        if abs(scale) > abs(top):
            top = scale
    d = half_bits(top / np.float32(-128))
    if magnitude(source, SUPER) << 16 >= INFINITE:
        d = 0x7E00
    put16(to, 104, d)
    unit = half_value(d)
    for i in range(COUNT):
        sc = np.float32(0)
        if unit != np.float32(0):
            sc = min(max(f32(get32(work + 16, i)) / unit, np.float32(-128)), np.float32(127))
            sc = (sc + _SHIFT) - _SHIFT
        put8(to + 192 + i, np.int64(sc))
        codes(source + 2 * SUB * i, unit * sc, work + 128 + SUB * i)
    pack(work + 128, to)


def _rows(frame):
    """A block is a row. Words: source, its stride, k, blocks, 1 KiB.

    The loop stands in ``kquants`` and ``gguf`` too: numba's cache finds a body again by the numbers that it
    captures, not by the functions, so that one body for all three would be compiled anew in each process.
    """
    source, source_stride, k, to, work = (
        word(frame, 2),
        word(frame, 3),
        word(frame, 4),
        word(frame, 5),
        word(frame, 6),
    )
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
            _super(x, to + (row * blocks + c) * BYTES, work)


kernel = Kernel(_rows)
