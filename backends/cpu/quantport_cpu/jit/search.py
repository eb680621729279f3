"""Searches block scales of least squared error near a first one: ``numerics.search.scale`` and ``outer``."""

from __future__ import annotations

import numpy as np
from numba import literally, njit
from numba.core import types

from quantport_cpu.jit.elements import ELEMENTS, NUMBERS, element_of
from quantport_cpu.jit.encode import largest_magnitude
from quantport_cpu.jit.minifloat_encode import (
    DIVIDE,
    MULTIPLY,
    e4m3_value,
    e8m0_code,
    e8m0_value,
    encode_by_power,
    round_to_minifloat,
)
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import (
    as_bits,
    as_float,
    clear_by_16,
    copy_bytes,
    store_uint8,
    store_uint32,
    words,
)
from quantport_cpu.jit.simd import F32, I16, I32, I64, Simd, Value, inline

OUTER, INNER = 512, 32
_E2M1 = NUMBERS["e2m1"]
_STEPS = tuple(np.float32(2.0 ** (-i / 8)) for i in range(8))
_INFINITY = np.float32(np.inf)


@inline(types.float32, 3, 4, 5)
def loss(
    simd: Simd, source: Value, scale: Value, inverse: Value, n_format: int, n_size: int, method: int
) -> Value:
    """Squared error of bf16 under one scale."""
    if element_of(n_format).codebook:
        return F32(0)  # typed, and never run
    x = simd.load_bf16(n_size, source)
    scales = simd.splat(scale, n_size)
    q = simd.b.fmul(x, simd.splat(inverse, n_size)) if method == MULTIPLY else simd.b.fdiv(x, scales)
    error = simd.b.fsub(x, simd.b.fmul(round_to_minifloat(simd, q, element_of(n_format)), scales))
    return simd.reduce_lanes(simd.b.fmul(error, error))


@njit(error_model="numpy")
def search_e8m0_scale(source, start, n_format, n_size):
    """e8m0 code of least error: the first one, one below, or one above."""
    n_format, n_size = literally(n_format), literally(n_size)
    least, best = _INFINITY, start
    if start < 255:
        for step in (0, -1, 1):
            code = min(254, max(0, start + step))
            total = loss(source, e8m0_value(code), e8m0_value(254 - code), n_format, n_size, MULTIPLY)
            if total < least:
                least, best = total, code
    return best


@njit(error_model="numpy")
def search_e4m3_scale(source, start, factor, n_format, n_size):
    """e4m3fn code of least error under a global factor: from 3 codes below the first one to 6 above."""
    n_format, n_size = literally(n_format), literally(n_size)
    least, best = _INFINITY, start
    if start < 127:
        for step in (0, -1, 1, -2, 2, -3, 3, 4, 5, 6):
            code = min(126, max(1, start + step))
            divisor = e4m3_value(code) / factor
            total = loss(source, divisor, divisor, n_format, n_size, DIVIDE)
            if total < least:
                least, best = total, code
    return best


@inline(types.float32)
def outer_loss(simd: Simd, source: Value, candidate: Value, squares: Value) -> Value:
    """Squared error of 512 bf16 under an outer scale, with inner scales by the rule ``even``.

    ``squares`` is 2 KiB of memory.
    """
    element = ELEMENTS["e2m1"]
    outer = simd.splat(candidate, INNER)
    with simd.steps(I64(OUTER), INNER) as i:
        x = simd.load_bf16(INNER, simd.at(source, simd.b.mul(i, I64(2))))
        inner = simd.b.fdiv(x, outer)
        top = simd.call(
            "llvm.vector.reduce.umax.v32i32", I32, simd.int_op("and_", simd.bitcast(inner, I32), 0x7FFFFFFF)
        )
        top = simd.b.lshr(simd.b.add(top, I32(1 << 21)), I32(23))
        exponent = _clamp_exponent(simd, simd.b.sub(top, I32(2)))
        step = simd.splat(_e8m0_value(simd, exponent), INNER)
        inverse = simd.splat(_e8m0_value(simd, simd.b.sub(I32(254), exponent)), INNER)
        value = simd.b.fmul(round_to_minifloat(simd, simd.b.fmul(inner, inverse), element), step)
        error = simd.b.fsub(x, simd.b.fmul(value, outer))
        simd.store(simd.b.fmul(error, error), simd.at(squares, simd.b.mul(i, I64(4))))
    parts = [simd.load(F32, INNER, simd.at(squares, 4 * INNER * i)) for i in range(OUTER // INNER)]
    while len(parts) > 1:
        parts = [
            simd.b.fadd(a, b) for a, b in zip(parts[: len(parts) // 2], parts[len(parts) // 2 :], strict=True)
        ]
    return simd.reduce_lanes(parts[0])


def _clamp_exponent(simd: Simd, exponent: Value) -> Value:
    low, high = I32(0), I32(254)
    exponent = simd.b.select(simd.b.icmp_signed("<", exponent, low), low, exponent)
    return simd.b.select(simd.b.icmp_signed(">", exponent, high), high, exponent)


def _e8m0_value(simd: Simd, exponent: Value) -> Value:
    """fp32 value of an e8m0 code below 255."""
    normal = simd.b.shl(exponent, I32(23))
    return simd.b.bitcast(
        simd.b.select(simd.b.icmp_signed("==", exponent, I32(0)), I32(1 << 22), normal), F32
    )


@inline(types.void)
def divide_to_bf16(simd: Simd, source: Value, to: Value, scale: Value) -> None:
    """512 bf16 divided by a scale and rounded to bf16, to nearest even."""
    with simd.steps(I64(OUTER), INNER) as i:
        x = simd.load_bf16(INNER, simd.at(source, simd.b.mul(i, I64(2))))
        bits = simd.bitcast(simd.b.fdiv(x, simd.splat(scale, INNER)), I32)
        odd = simd.int_op("and_", simd.int_op("lshr", bits, 16), 1)
        bits = simd.int_op("lshr", simd.b.add(simd.int_op("add", bits, 0x7FFF), odd), 16)
        simd.store(simd.narrow(bits, I16), simd.at(to, simd.b.mul(i, I64(2))))


@njit(error_model="numpy")
def _quantize_outer_block(source, to, count, out, outer, index, work, rule):
    bits = largest_magnitude(source, OUTER) << 16
    first = as_float(bits) / np.float32(6)
    if first == np.float32(0):
        first = np.float32(2.0**-23)
    least, best = _INFINITY, first
    is_searched, add, emax, high = words(rule, 0, 4)
    if is_searched and bits < 0x7F800000:
        for step in _STEPS:
            candidate = first * step
            total = outer_loss(source, candidate, work)
            if total < least:
                least, best = total, candidate
    store_uint32(outer, index, as_bits(best))
    divide_to_bf16(source, work, best)
    for i in range((count + INNER - 1) // INNER):
        here = work + 2 * INNER * i
        code = e8m0_code(largest_magnitude(here, INNER) << 16, add, emax, as_float(high))
        if is_searched:
            code = search_e8m0_scale(here, code, _E2M1, INNER)
        store_uint8(out + i, code)
        encode_by_power(here, to + INNER // 2 * i, INNER, code, _E2M1, INNER)


def _dual_rows(frame):
    """A block is a row.

    Words: source, its stride, k, codes, their stride, scales, outer scales, 3584 bytes; and the rule of the
    scales: whether to search, what it adds, emax, and the divisor of amax (fp32 bits).
    """
    source, source_stride, k, to, to_stride = words(frame, 2, 5)
    out, outer, work = words(frame, 7, 3)
    blocks, outers, bounce = (k + INNER - 1) // INNER, (k + OUTER - 1) // OUTER, work + 4 * OUTER
    while True:
        row = next_block(frame)
        if row >= block_count(frame):
            break
        for c in range(outers):
            here, codes = source + row * source_stride + 2 * OUTER * c, to + row * to_stride + OUTER // 2 * c
            x, q, size = here, codes, min(OUTER, k - OUTER * c)
            if size < OUTER:
                clear_by_16(bounce, 3 * OUTER)
                copy_bytes(bounce, here, 2 * size)
                x, q = bounce, bounce + 2 * OUTER
            _quantize_outer_block(
                x, q, size, out + row * blocks + OUTER // INNER * c, outer, row * outers + c, work, frame + 80
            )
            if size < OUTER:
                copy_bytes(codes, q, to_stride - OUTER // 2 * c)


dual_kernel = Kernel(_dual_rows)
