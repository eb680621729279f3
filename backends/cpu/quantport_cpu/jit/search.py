"""Block scales of least squared error among the neighbours of a first one (``numerics.search.scale`` and
``outer``).
"""

from __future__ import annotations

import numpy as np
from numba import literally, njit
from numba.core import types

from quantport_cpu.jit.elements import ELEMENTS, NUMBERS, element_of
from quantport_cpu.jit.emit import F32, I16, I32, I64, Simd, Value, inline
from quantport_cpu.jit.encode import bits32, f32, magnitude, put8, put32
from quantport_cpu.jit.frame import Kernel, take, word
from quantport_cpu.jit.repack import move, wipe
from quantport_cpu.jit.small import (
    DIVIDE,
    MULTIPLY,
    e4m3_value,
    e8m0_of,
    floats,
    multiplied,
    power_value,
    rounded,
)

OUTER, INNER = 512, 32
_E2M1 = NUMBERS["e2m1"]
_STEPS = tuple(np.float32(2.0 ** (-i / 8)) for i in range(8))
_INFINITY = np.float32(np.inf)


@inline(types.float32, 3, 4, 5)
def loss(
    simd: Simd, source: Value, scale: Value, inverse: Value, n_format: int, n_size: int, how: int
) -> Value:
    """Squared error of bf16 under one scale."""
    if element_of(n_format).codebook:
        return F32(0)  # typed, and never run
    x = floats(simd, source, n_size)
    scales = simd.splat(scale, n_size)
    q = simd.b.fmul(x, simd.splat(inverse, n_size)) if how == MULTIPLY else simd.b.fdiv(x, scales)
    error = simd.b.fsub(x, simd.b.fmul(rounded(simd, q, element_of(n_format)), scales))
    return simd.total(simd.b.fmul(error, error))


@njit(error_model="numpy")
def power_search(source, start, n_format, n_size):
    """e8m0 code of least error: the first one, one below, or one above."""
    n_format, n_size = literally(n_format), literally(n_size)
    best, kept = _INFINITY, start
    if start < 255:
        for step in (0, -1, 1):
            code = min(254, max(0, start + step))
            total = loss(source, power_value(code), power_value(254 - code), n_format, n_size, MULTIPLY)
            if total < best:
                best, kept = total, code
    return kept


@njit(error_model="numpy")
def float_search(source, start, factor, n_format, n_size):
    """e4m3fn code of least error under a global factor: from 3 codes below the first one to 6 above."""
    n_format, n_size = literally(n_format), literally(n_size)
    best, kept = _INFINITY, start
    if start < 127:
        for step in (0, -1, 1, -2, 2, -3, 3, 4, 5, 6):
            code = min(126, max(1, start + step))
            divisor = e4m3_value(code) / factor
            total = loss(source, divisor, divisor, n_format, n_size, DIVIDE)
            if total < best:
                best, kept = total, code
    return kept


@inline(types.float32)
def outer_loss(simd: Simd, source: Value, candidate: Value, squares: Value) -> Value:
    """Squared error of 512 bf16 under an outer scale, with scales of rule ``even`` inside; ``squares`` is 2
    KiB of memory.
    """
    element = ELEMENTS["e2m1"]
    outer = simd.splat(candidate, INNER)
    with simd.steps(I64(OUTER), INNER) as i:
        x = floats(simd, simd.at(source, simd.b.mul(i, I64(2))), INNER)
        inner = simd.b.fdiv(x, outer)
        top = simd.call(
            "llvm.vector.reduce.umax.v32i32", I32, simd.integer("and_", simd.bits(inner, I32), 0x7FFFFFFF)
        )
        top = simd.b.lshr(simd.b.add(top, I32(1 << 21)), I32(23))
        exponent = _limited(simd, simd.b.sub(top, I32(2)))
        step = simd.splat(_power(simd, exponent), INNER)
        inverse = simd.splat(_power(simd, simd.b.sub(I32(254), exponent)), INNER)
        value = simd.b.fmul(rounded(simd, simd.b.fmul(inner, inverse), element), step)
        error = simd.b.fsub(x, simd.b.fmul(value, outer))
        simd.store(simd.b.fmul(error, error), simd.at(squares, simd.b.mul(i, I64(4))))
    parts = [simd.load(F32, INNER, simd.at(squares, 4 * INNER * i)) for i in range(OUTER // INNER)]
    while len(parts) > 1:
        parts = [
            simd.b.fadd(a, b) for a, b in zip(parts[: len(parts) // 2], parts[len(parts) // 2 :], strict=True)
        ]
    return simd.total(parts[0])


def _limited(simd: Simd, exponent: Value) -> Value:
    low, high = I32(0), I32(254)
    exponent = simd.b.select(simd.b.icmp_signed("<", exponent, low), low, exponent)
    return simd.b.select(simd.b.icmp_signed(">", exponent, high), high, exponent)


def _power(simd: Simd, exponent: Value) -> Value:
    """fp32 value of an e8m0 code below 255."""
    word = simd.b.shl(exponent, I32(23))
    return simd.b.bitcast(simd.b.select(simd.b.icmp_signed("==", exponent, I32(0)), I32(1 << 22), word), F32)


@inline(types.void)
def shrink(simd: Simd, source: Value, to: Value, scale: Value) -> None:
    """512 bf16 divided by a scale and rounded to bf16, to nearest even."""
    with simd.steps(I64(OUTER), INNER) as i:
        x = floats(simd, simd.at(source, simd.b.mul(i, I64(2))), INNER)
        bits = simd.bits(simd.b.fdiv(x, simd.splat(scale, INNER)), I32)
        odd = simd.integer("and_", simd.integer("lshr", bits, 16), 1)
        bits = simd.integer("lshr", simd.b.add(simd.integer("add", bits, 0x7FFF), odd), 16)
        simd.store(simd.narrow(bits, I16), simd.at(to, simd.b.mul(i, I64(2))))


@njit(error_model="numpy")
def _dual(source, to, count, out, outer, index, work, rule):
    bits = magnitude(source, OUTER) << 16
    first = f32(bits) / np.float32(6)
    if first == np.float32(0):
        first = np.float32(2.0**-23)
    best, kept = _INFINITY, first
    is_searched = word(rule, 0) != 0
    if is_searched and bits < 0x7F800000:
        for step in _STEPS:
            candidate = first * step
            total = outer_loss(source, candidate, work)
            if total < best:
                best, kept = total, candidate
    put32(outer, index, bits32(kept))
    shrink(source, work, kept)
    for i in range((count + INNER - 1) // INNER):
        here = work + 2 * INNER * i
        code = e8m0_of(magnitude(here, INNER) << 16, word(rule, 1), word(rule, 2), f32(word(rule, 3)))
        if is_searched:
            code = power_search(here, code, _E2M1, INNER)
        put8(out + i, code)
        multiplied(here, to + INNER // 2 * i, INNER, code, _E2M1, INNER)


def _dual_rows(frame):
    """A block is a row. Words: source, its stride, k, codes, their stride, scales, outer scales, 3584 bytes,
    and what the rule of the scales is: whether to search, what it adds, emax, and the divisor of amax (fp32
    bits)."""
    source, source_stride, k, to, to_stride = (
        word(frame, 2),
        word(frame, 3),
        word(frame, 4),
        word(frame, 5),
        word(frame, 6),
    )
    out, outer, work = word(frame, 7), word(frame, 8), word(frame, 9)
    blocks, outers, bounce = (k + INNER - 1) // INNER, (k + OUTER - 1) // OUTER, work + 4 * OUTER
    while True:
        row = take(frame)
        if row >= word(frame, 1):
            break
        for c in range(outers):
            here, codes = source + row * source_stride + 2 * OUTER * c, to + row * to_stride + OUTER // 2 * c
            x, q, size = here, codes, min(OUTER, k - OUTER * c)
            if size < OUTER:
                wipe(bounce, 3 * OUTER)
                move(bounce, here, 2 * size)
                x, q = bounce, bounce + 2 * OUTER
            _dual(
                x, q, size, out + row * blocks + OUTER // INNER * c, outer, row * outers + c, work, frame + 80
            )
            if size < OUTER:
                move(codes, q, to_stride - OUTER // 2 * c)


dual_kernel = Kernel(_dual_rows)
