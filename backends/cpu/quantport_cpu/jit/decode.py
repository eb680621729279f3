"""Generates the decoding of weights to bf16, for a matmul of many rows: e4m3fn, and int4."""

from __future__ import annotations

from typing import Any

from numba.core import types

from quantport.backend import once
from quantport_cpu.jit import factors
from quantport_cpu.jit.gemm_fp32 import decode_columns
from quantport_cpu.jit.gemv_bytes import e4m3_to_fp16
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import words
from quantport_cpu.jit.simd import F32, I64, Simd, Value, cgutils, inline

LANES = 16
BYTES = 32  # e4m3fn codes of one step
CHUNK = 128  # columns that share a scale, where there are several


@inline(types.void)
def fp8_row(
    simd: Simd, w: Value, k: Value, chunk: Value, scale: Value, scale_step: Value, out: Value
) -> None:
    """One row of e4m3fn, with a scale for every ``chunk`` columns, as bf16 of the value / 256."""
    bounces = [simd.buffer(BYTES), simd.buffer(2 * BYTES)]

    def decode(source: Value, to: Value, factor: Value) -> None:
        half = e4m3_to_fp16(simd, source)
        for i in (0, LANES):
            value = simd.half_to_float(simd.shuffle(half, half, range(i, i + LANES)))
            simd.store_bf16(simd.b.fmul(value, factor), simd.at(to, 2 * i))

    with cgutils.for_range_slice(simd.b, I64(0), k, chunk, I64) as (begin, count):
        left = simd.b.sub(k, begin)
        length = simd.b.select(simd.b.icmp_signed("<", left, chunk), left, chunk)
        here, to = simd.at(w, begin), simd.at(out, simd.b.shl(begin, I64(1)))
        factor = simd.splat(simd.load(F32, 0, simd.at(scale, simd.b.mul(count, scale_step))), LANES)
        with simd.steps(length, BYTES) as i:
            decode(simd.at(here, i), simd.at(to, simd.b.shl(i, I64(1))), factor)
        with simd.remainder(length, BYTES) as (start, size):
            simd.copy(bounces[0], simd.at(here, start), size)
            decode(bounces[0], bounces[1], factor)
            simd.copy(simd.at(to, simd.b.shl(start, I64(1))), bounces[1], simd.b.shl(size, I64(1)))


def _fp8(frame):
    """A block is a row. Words: weights, k, chunk, scales, the bytes from one to the next and from row to row
    of them, number of the first row in the weight, out.
    """
    w, k, chunk, scale, scale_step = words(frame, 2, 5)
    scale_stride, first, out = words(frame, 7, 3)
    while True:
        row = next_block(frame)
        if row >= block_count(frame):
            break
        fp8_row(
            w + row * k, k, chunk, scale + (first + row >> 7) * scale_stride, scale_step, out + 2 * k * row
        )


fp8_kernel = Kernel(_fp8)


def _int4_body(group: int, n_zero: int, factor: int) -> Any:
    factor_bytes = factors.BYTES[factor]

    def rows(frame):
        w, scale, zero, k, out, stride = words(frame, 2, 6)
        codes_stride, scale_stride = (k + 7) // 8 * 4, (k + group - 1) // group * factor_bytes
        while True:
            row = next_block(frame)
            if row >= block_count(frame):
                break
            s, z = scale + row * scale_stride, zero + row * scale_stride
            decode_columns(w + row * codes_stride, s, z, 0, k, out + row * stride, group, n_zero, factor, 2)

    return rows


@once
def int4_kernel(group: int, has_zero: bool, factor: int) -> Kernel:
    """The kernel for int4 as it is stored. A block is a row.

    Words: weights, scales, offsets or 0, k, out, its stride.
    """
    return Kernel(_int4_body(group, int(has_zero), factor))
