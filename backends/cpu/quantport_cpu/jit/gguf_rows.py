"""Quantizes rows of activations to GGUF's q8_0 and q8_k, as ``numerics.gguf`` does, for ``gemm_gguf``.

Codes and scales are those of the blocks. Beside them lies what a product with codes that are stored with an
offset needs, the sums of codes.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from llvmlite import ir
from numba.core import types

from quantport.backend import once
from quantport_cpu.jit.gguf import encode_q8_0
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import words
from quantport_cpu.jit.simd import F16, F32, I8, I16, I32, I64, Simd, Value, inline

STEP = 32
INFINITY = 0x7F800000  # bits of fp32
# What a block becomes, by the codes of the weight that it meets: 32 int8 and, as int32, -8 or -128 times the
# sums of four; 32 int16, those of even columns first; 256 int8 and, as int16, the sums of 16.
NIBBLES, UNSIGNED, SIGNED, K = range(4)
COLUMNS = (32, 32, 32, 256)
SCALE_AT = (64, 64, 64, 288)  # fp32
BLOCK_BYTES = (80, 80, 80, 320)
_FACTOR = (-8, -128)


def _source(simd: Simd, address: Value, column: int, n_bytes: int) -> Value:
    """32 activations of 2 bytes, bf16, or 4, fp32."""
    here = simd.at(address, n_bytes * column)
    return simd.load_bf16(STEP, here) if n_bytes == 2 else simd.load(F32, STEP, here)


def _magnitudes(simd: Simd, x: Value) -> Value:
    return simd.int_op("and_", simd.bitcast(x, I32), 0x7FFFFFFF)


def _unless_finite(simd: Simd, top: Value, scale: Value) -> Value:
    """NaN where the largest magnitude, as bits, is that of a NaN or an Inf."""
    is_finite = simd.b.icmp_unsigned("<", top, I32(INFINITY))
    return simd.b.select(is_finite, scale, ir.Constant(F32, float("nan")))


def _inverse(simd: Simd, of: Value) -> Value:
    """1 / of, and 0 where that is 0."""
    return simd.b.select(simd.b.fcmp_ordered("==", of, F32(0.0)), F32(0.0), simd.b.fdiv(F32(1.0), of))


def _sums(simd: Simd, codes: Value, lanes: int) -> Value:
    """Sums of ``32 / lanes`` neighbours of 32 codes, as int16."""
    total = simd.dot_byte_pairs(simd.splat(1, STEP, I8), codes)
    while total.type.count > lanes:
        total = simd.b.add(*(simd.shuffle(total, total, range(i, total.type.count, 2)) for i in (0, 1)))
    return total


def _block_of_32(simd: Simd, x: Value, to: Value, n_kind: int, n_bytes: int) -> None:
    values = _source(simd, x, 0, n_bytes)
    top = simd.reduce_lanes(_magnitudes(simd, values), "umax")
    d = simd.b.fdiv(simd.b.bitcast(top, F32), F32(127.0))
    stored = simd.b.fpext(simd.b.fptrunc(d, F16), F32)
    simd.store(_unless_finite(simd, top, stored), simd.at(to, SCALE_AT[n_kind]))
    codes = encode_q8_0(simd, values, simd.splat(_inverse(simd, d), STEP))
    if n_kind == SIGNED:
        evens_first = simd.shuffle(codes, codes, [*range(0, STEP, 2), *range(1, STEP, 2)])
        simd.store(simd.widen(evens_first, I16, signed=True), to)
        return
    simd.store(codes, to)
    sums = simd.widen(_sums(simd, codes, 8), I32, signed=True)
    simd.store(simd.int_op("mul", sums, _FACTOR[n_kind]), simd.at(to, STEP))


def _first(simd: Simd, x: Value, bits: Value, n_bytes: int) -> Value:
    """The first of 256 activations with this magnitude."""
    address = x
    for column in reversed(range(0, 256, STEP)):
        magnitudes = _magnitudes(simd, _source(simd, x, column, n_bytes))
        found = simd.b.bitcast(simd.b.icmp_signed("==", magnitudes, simd.splat(bits, STEP)), I32)
        index = simd.b.zext(simd.b.cttz(found, ir.Constant(ir.IntType(1), 0)), I64)
        here = simd.at(simd.at(x, n_bytes * column), simd.b.mul(index, I64(n_bytes)))
        address = simd.b.select(simd.b.icmp_signed("!=", found, I32(0)), here, address)
    if n_bytes == 4:
        return simd.load(F32, 0, address)
    return simd.b.bitcast(simd.b.shl(simd.b.zext(simd.load(I16, 0, address), I32), I32(16)), F32)


def _block_of_256(simd: Simd, x: Value, to: Value, n_bytes: int) -> None:
    columns = range(0, 256, STEP)
    largest = [_magnitudes(simd, _source(simd, x, column, n_bytes)) for column in columns]
    top = simd.reduce_lanes(reduce(lambda a, b: simd.intrinsic("umax", a, b), largest), "umax")
    inverse = simd.b.fdiv(F32(-127.0), _first(simd, x, top, n_bytes))
    magnitude = simd.b.and_(simd.b.bitcast(inverse, I32), I32(0x7FFFFFFF))
    inverse = simd.b.select(simd.b.icmp_unsigned("<", magnitude, I32(INFINITY)), inverse, F32(0.0))
    simd.store(_unless_finite(simd, top, _inverse(simd, inverse)), simd.at(to, SCALE_AT[K]))
    for column in columns:
        q = simd.b.fmul(_source(simd, x, column, n_bytes), simd.splat(inverse, STEP))
        q = simd.b.fadd(q, simd.splat(1.5 * 2.0**23, STEP, F32))  # integers, to nearest even, in the low bits
        codes = simd.narrow(simd.bitcast(q, I32), I8)
        simd.store(codes, simd.at(to, column))
        simd.store(_sums(simd, codes, 2), simd.at(to, 256 + column // 8))


@inline(types.void, 3, 4)
def quantize_row(simd: Simd, x: Value, k: Value, to: Value, n_kind: int, n_bytes: int) -> None:
    """Quantizes ``k`` activations of ``n_bytes``; a short last block is filled with zeros."""
    columns = COLUMNS[n_kind]
    bounce = simd.buffer(columns * n_bytes)

    def block(source: Value, column: Value) -> None:
        here = simd.at(to, simd.b.mul(simd.b.udiv(column, I64(columns)), I64(BLOCK_BYTES[n_kind])))
        if n_kind == K:
            _block_of_256(simd, source, here, n_bytes)
        else:
            _block_of_32(simd, source, here, n_kind, n_bytes)

    with simd.steps(k, columns) as column:
        block(simd.at(x, simd.b.mul(column, I64(n_bytes))), column)
    with simd.remainder(k, columns) as (start, size):
        simd.copy(bounce, simd.at(x, simd.b.mul(start, I64(n_bytes))), simd.b.mul(size, I64(n_bytes)))
        block(bounce, start)


def _body(n_kind: int, n_bytes: int) -> Any:
    def rows(frame):
        x, x_stride, k, to, stride = words(frame, 2, 5)
        while True:
            row = next_block(frame)
            if row >= block_count(frame):
                break
            quantize_row(x + row * x_stride, k, to + row * stride, n_kind, n_bytes)

    return rows


@once
def kernel(kind: int, n_bytes: int) -> Kernel:
    """The kernel of one kind of row, from bf16 or fp32 (``n_bytes``). A block of the loop is a row.

    Words: activations, their stride, k, where blocks go, the stride there.
    """
    return Kernel(_body(kind, n_bytes))
