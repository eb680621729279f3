"""Block scales of least squared error among the neighbours of a first one (``numerics.search.scale`` and ``outer``)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit
from numba.core import types

from quantport.backend import FORMATS
from quantport_cpu.jit.blocks import (
    DIVIDE,
    E8M0,
    MULTIPLY,
    NUMBERS,
    codes_of,
    e4m3_scale,
    e4m3_value,
    e8m0_of,
    floats,
    format_of,
    power_value,
    rounded,
    row_by_row,
)  # fmt: skip
from quantport_cpu.jit.emit import F32, I16, I32, I64, Simd, Value, inline
from quantport_cpu.jit.encode import bits32, f32, magnitude, put8, put32
from quantport_cpu.jit.frame import Kernel, take, word
from quantport_cpu.jit.repack import move, wipe

OUTER, INNER = 512, 32
_INFINITY = np.float32(np.inf)


@inline(types.float32, 3, 4, 5)
def loss(simd: Simd, source: Value, scale: Value, inverse: Value, n_format: int, n_size: int, how: int) -> Value:
    """Squared error of bf16 under one scale."""
    x = floats(simd, source, n_size)
    scales = simd.splat(scale, n_size)
    q = simd.b.fmul(x, simd.splat(inverse, n_size)) if how == MULTIPLY else simd.b.fdiv(x, scales)
    error = simd.b.fsub(x, simd.b.fmul(rounded(simd, q, format_of(n_format)), scales))
    return simd.total(simd.b.fmul(error, error))


@cache
def _power_search(n_format: int, group: int) -> Any:
    """One block with a power-of-two scale: that of rule ``floor``, one below, or one above."""

    @njit(error_model="numpy")
    def block(source, to, out, emax):  # type: ignore[no-untyped-def]  # numba infers the types
        start = e8m0_of(magnitude(source, group) << 16, 0, emax, np.float32(0))
        best, kept = _INFINITY, start
        if start < 255:
            for i in range(3):
                code = min(254, max(0, start + (i & 1) * -1 + (i >> 1)))
                total = loss(source, power_value(code), power_value(254 - code), n_format, group, MULTIPLY)
                if total < best:
                    best, kept = total, code
        put8(out, kept)
        codes_of(source, to, group, np.float32(1), power_value(254 - min(kept, 254)), n_format, group, MULTIPLY)

    return block


@cache
def _float_search(n_format: int, group: int) -> Any:
    """One block with an e4m3fn scale under a global factor: from 3 codes below that of amax to 6 above."""

    @njit(error_model="numpy")
    def block(source, to, out, high, factor):  # type: ignore[no-untyped-def]  # numba infers the types
        start = e4m3_scale(factor * (f32(magnitude(source, group) << 16) / high))
        best, kept = _INFINITY, start
        if start < 127:
            for i in range(10):  # 0, -1, 1, -2, 2, -3, 3, 4, 5, 6
                step = (i + 1 >> 1) * (1 - 2 * (i & 1)) if i < 7 else i - 3
                code = min(126, max(1, start + step))
                divisor = e4m3_value(code) / factor
                total = loss(source, divisor, divisor, n_format, group, DIVIDE)
                if total < best:
                    best, kept = total, code
        put8(out, kept)
        divisor = e4m3_value(kept) / factor
        codes_of(source, to, group, divisor, divisor, n_format, group, DIVIDE)

    return block


def _body(n_format: int, group: int, scale_kind: int, size: int) -> Any:
    power, real = _power_search(n_format, group), _float_search(n_format, group)

    @njit(error_model="numpy")
    def block(source, to, out, index, add, emax, high, factor):  # type: ignore[no-untyped-def]  # numba infers the types
        if scale_kind == E8M0:
            power(source, to, out + index, emax)
        else:
            real(source, to, out + index, high, factor)

    return row_by_row(block, group, size)


@cache
def kernel(name: str, group: int, scale_kind: int) -> Kernel:
    """The searching kernel of one format; the words are those of ``blocks.kernel``."""
    return Kernel(_body(NUMBERS[name], group, scale_kind, group * FORMATS[name].bits // 8))


@inline(types.float32)
def outer_loss(simd: Simd, source: Value, candidate: Value, squares: Value) -> Value:
    """Squared error of 512 bf16 under an outer scale, with scales of rule ``even`` inside; ``squares`` is 2 KiB of memory."""
    element = FORMATS["e2m1"]
    outer = simd.splat(candidate, INNER)
    with simd.steps(I64(OUTER), INNER) as i:
        x = floats(simd, simd.at(source, simd.b.mul(i, I64(2))), INNER)
        inner = simd.b.fdiv(x, outer)
        top = simd.call("llvm.vector.reduce.umax.v32i32", I32, simd.integer("and_", simd.bits(inner, I32), 0x7FFFFFFF))
        top = simd.b.lshr(simd.b.add(top, I32(1 << 21)), I32(23))
        exponent = _limited(simd, simd.b.sub(top, I32(2)))
        step = simd.splat(_power(simd, exponent), INNER)
        inverse = simd.splat(_power(simd, simd.b.sub(I32(254), exponent)), INNER)
        value = simd.b.fmul(rounded(simd, simd.b.fmul(inner, inverse), element), step)
        error = simd.b.fsub(x, simd.b.fmul(value, outer))
        simd.store(simd.b.fmul(error, error), simd.at(squares, simd.b.mul(i, I64(4))))
    parts = [simd.load(F32, INNER, simd.at(squares, 4 * INNER * i)) for i in range(OUTER // INNER)]
    while len(parts) > 1:
        parts = [simd.b.fadd(a, b) for a, b in zip(parts[: len(parts) // 2], parts[len(parts) // 2 :], strict=True)]
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
def divided(simd: Simd, source: Value, to: Value, scale: Value) -> None:
    """512 bf16 divided by a scale and rounded to bf16, to nearest even."""
    with simd.steps(I64(OUTER), INNER) as i:
        x = floats(simd, simd.at(source, simd.b.mul(i, I64(2))), INNER)
        bits = simd.bits(simd.b.fdiv(x, simd.splat(scale, INNER)), I32)
        odd = simd.integer("and_", simd.integer("lshr", bits, 16), 1)
        bits = simd.integer("lshr", simd.b.add(simd.integer("add", bits, 0x7FFF), odd), 16)
        simd.store(simd.narrow(bits, I16), simd.at(to, simd.b.mul(i, I64(2))))


def _dual_body() -> Any:
    inner = _power_search(NUMBERS["e2m1"], INNER)
    steps = tuple(np.float32(2.0 ** (-i / 8)) for i in range(8))

    @njit(error_model="numpy")
    def block(source, to, count, out, outer, index, work):  # type: ignore[no-untyped-def]  # numba infers the types
        bits = magnitude(source, OUTER) << 16
        first = f32(bits) / np.float32(6)
        if first == np.float32(0):
            first = np.float32(2.0**-23)
        best, kept = _INFINITY, first
        if bits < 0x7F800000:
            for i in range(8):
                candidate = first * steps[i]
                total = outer_loss(source, candidate, work)
                if total < best:
                    best, kept = total, candidate
        put32(outer, index, bits32(kept))
        divided(source, work, kept)
        for i in range((count + INNER - 1) // INNER):
            inner(work + 2 * INNER * i, to + INNER // 2 * i, out + i, 2)

    def rows(frame):  # type: ignore[no-untyped-def]  # numba infers the types
        source, source_stride, k, to, to_stride = word(frame, 2), word(frame, 3), word(frame, 4), word(frame, 5), word(frame, 6)
        out, outer, work = word(frame, 7), word(frame, 8), word(frame, 9)
        blocks, outers, rest = (k + INNER - 1) // INNER, (k + OUTER - 1) // OUTER, k % OUTER
        while True:
            row = take(frame)
            if row >= word(frame, 1):
                break
            here, codes, scales = source + row * source_stride, to + row * to_stride, out + row * blocks
            for c in range(k // OUTER):
                to_, out_ = codes + OUTER // 2 * c, scales + OUTER // INNER * c
                block(here + 2 * OUTER * c, to_, OUTER, out_, outer, row * outers + c, work)
            if rest:
                bounce, done = work + 4 * OUTER, k // OUTER
                wipe(bounce, 3 * OUTER)
                move(bounce, here + 2 * OUTER * done, 2 * rest)
                out_ = scales + OUTER // INNER * done
                block(bounce, bounce + 2 * OUTER, rest, out_, outer, row * outers + outers - 1, work)
                move(codes + OUTER // 2 * done, bounce + 2 * OUTER, to_stride - OUTER // 2 * done)

    return rows


@cache
def dual_kernel() -> Kernel:
    """MXFP4 under an outer scale for 512. Words: source, its stride, k, codes, their stride, scales, outer scales, 4 KiB."""
    return Kernel(_dual_body())
