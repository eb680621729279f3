"""Quantizes to GGUF's q4_0 and q8_0: blocks of 32 with an fp16 scale, as ``numerics.gguf`` does."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from quantport.backend import once
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import clear_by_16, copy_bytes, words
from quantport_cpu.jit.simd import F16, F32, I8, I16, I32, I64, Simd, Value, inline

BLOCK = 32
Q4_0, Q8_0 = 0, 1
BYTES = {"q4_0": 18, "q8_0": 34}


def _encode_q4_0(simd: Simd, x: Value, inverse: Value) -> Value:
    """Codes 0 to 15, j low and j + 16 high in a byte. 8 is zero; rounding adds a half and truncates."""
    q = simd.b.fadd(simd.b.fmul(x, inverse), simd.splat(8.5, BLOCK, F32))
    q = simd.intrinsic("maxnum", q, simd.splat(0.0, BLOCK, F32))
    q = simd.intrinsic("minnum", q, simd.splat(15.0, BLOCK, F32))
    codes = simd.narrow(simd.b.fptosi(q, simd.bitcast(q, I32).type), I8)
    low, high = (simd.shuffle(codes, codes, range(i, i + BLOCK // 2)) for i in (0, BLOCK // 2))
    return simd.b.or_(low, simd.int_op("shl", high, 4))


def encode_q8_0(simd: Simd, x: Value, inverse: Value) -> Value:
    """int8 codes; halves away from zero."""
    scaled = simd.b.fmul(x, inverse)
    size = simd.intrinsic("fabs", scaled)
    whole = simd.intrinsic("floor", size)
    twice = simd.b.fmul(simd.b.fsub(size, whole), simd.splat(2.0, BLOCK, F32))
    q = simd.intrinsic("copysign", simd.b.fadd(whole, simd.intrinsic("floor", twice)), scaled)
    is_number = simd.b.fcmp_ordered("==", q, q)
    q = simd.b.select(is_number, q, simd.splat(0.0, BLOCK, F32))
    return simd.narrow(simd.b.fptosi(q, simd.bitcast(q, I32).type), I8)


def first_largest(simd: Simd, source: Value, lanes: int) -> Value:
    """The first of the largest magnitudes of ``lanes`` bf16, with its sign, as fp32."""
    magnitudes = simd.int_op("and_", simd.load(I16, lanes, source), 0x7FFF)
    top = simd.splat(simd.reduce_lanes(magnitudes, "umax"), lanes)
    is_top = simd.b.bitcast(simd.b.icmp_signed("==", magnitudes, top), ir.IntType(lanes))
    index = simd.b.zext(simd.b.cttz(is_top, ir.Constant(ir.IntType(1), 0)), I64)
    value = simd.load(I16, 0, simd.at(source, simd.b.shl(index, I64(1))))
    return simd.b.bitcast(simd.b.shl(simd.b.zext(value, I32), I32(16)), F32)


@inline(types.void, 2)
def encode_block(simd: Simd, source: Value, to: Value, n_kind: int) -> None:
    """Quantizes one block. A NaN or an Inf makes its scale NaN."""
    x = simd.load_bf16(BLOCK, source)
    magnitudes = simd.int_op("and_", simd.bitcast(x, I32), 0x7FFFFFFF)
    top = simd.call("llvm.vector.reduce.umax.v32i32", I32, magnitudes)
    if n_kind == Q4_0:  # the largest becomes code -8
        d = simd.b.fdiv(first_largest(simd, source, BLOCK), F32(-8.0))
    else:
        d = simd.b.fdiv(simd.b.bitcast(top, F32), F32(127.0))
    inverse = simd.b.select(simd.b.fcmp_ordered("==", d, F32(0.0)), F32(0.0), simd.b.fdiv(F32(1.0), d))
    stored = simd.b.bitcast(simd.b.fptrunc(d, F16), I16)
    stored = simd.b.select(simd.b.icmp_unsigned(">=", top, I32(0x7F800000)), I16(0x7E00), stored)
    simd.store(stored, to)
    encode = _encode_q4_0 if n_kind == Q4_0 else encode_q8_0
    simd.store(encode(simd, x, simd.splat(inverse, BLOCK)), simd.at(to, 2))


def _body(n_kind: int, size: int) -> Any:
    def rows(frame):
        source, source_stride, k, to, bounce = words(frame, 2, 5)
        blocks = (k + BLOCK - 1) // BLOCK
        while True:
            row = next_block(frame)
            if row >= block_count(frame):
                break
            for c in range(blocks):
                x, rest = source + row * source_stride + 2 * BLOCK * c, k - BLOCK * c
                if rest < BLOCK:
                    clear_by_16(bounce, 2 * BLOCK)
                    copy_bytes(bounce, x, 2 * rest)
                    x = bounce
                encode_block(x, to + (row * blocks + c) * size, n_kind)

    return rows


@once
def kernel(name: str) -> Kernel:
    """The kernel of one block type. Words: source, its stride, k, blocks, buffer of 64 bytes."""
    return Kernel(_body({"q4_0": Q4_0, "q8_0": Q8_0}[name], BYTES[name]))
