"""Generates the decoding of weights to bf16, for a matmul of many rows: e4m3fn, and int4 in ATen's layout."""

from __future__ import annotations

from typing import Any

from numba.core import types

from quantport.backend import once
from quantport_cpu.jit.gemv_bytes import e4m3_to_fp16
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import words
from quantport_cpu.jit.simd import F32, I8, I32, I64, Simd, Value, cgutils, inline

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


@inline(types.void, 7)
def int4_block(
    simd: Simd,
    w: Value,
    k: Value,
    group: Value,
    pairs: Value,
    pairs_stride: Value,
    out: Value,
    out_stride: Value,
    n_block: int,
) -> None:
    """``n_block`` channels, columns down and channels across, as bf16."""
    half = n_block // 2
    with cgutils.for_range_slice(simd.b, I64(0), k, group, I64) as (begin, count):
        line = simd.at(pairs, simd.b.mul(count, pairs_stride))
        both = [simd.load(I32, LANES, simd.at(line, 4 * i)) for i in range(0, n_block, LANES)]
        scales = [simd.bitcast(simd.int_op("shl", v, 16), F32) for v in both]
        zeros = [simd.bitcast(simd.int_op("and_", v, -65536), F32) for v in both]
        eight = simd.splat(-8.0, LANES, F32)
        lows = [simd.intrinsic("fma", s, eight, z) for s, z in zip(scales, zeros, strict=True)]
        with cgutils.for_range_slice(simd.b, begin, simd.b.add(begin, group), I64(1), I64) as (column, _):
            source = simd.at(w, simd.b.mul(column, I64(half)))
            to = simd.at(out, simd.b.mul(column, out_stride))
            wide = [simd.widen(simd.load(I8, LANES, simd.at(source, i)), I32) for i in range(0, half, LANES)]
            codes = [simd.int_op("and_", v, 15) for v in wide] + [simd.int_op("lshr", v, 4) for v in wide]
            for i, (code, scale, low) in enumerate(zip(codes, scales, lows, strict=True)):
                value = simd.intrinsic("fma", simd.int_to_float(code), scale, low)
                simd.store_bf16(value, simd.at(to, 2 * LANES * i))


def _int4_body(n_block: int) -> Any:
    def blocks(frame):
        w, k, group, pairs, pairs_stride = words(frame, 2, 5)
        out, out_stride = words(frame, 7, 2)
        while True:
            block = next_block(frame)
            if block >= block_count(frame):
                break
            here, scales = w + block * (n_block >> 1) * k, pairs + 4 * n_block * block
            int4_block(here, k, group, scales, pairs_stride, out + 2 * n_block * block, out_stride, n_block)

    return blocks


@once
def int4_kernel(block: int) -> Kernel:
    """The kernel for int4 in blocks of 64 channels, or of 32.

    Words: weights, k, group, pairs of scale and offset, bytes from group to group of them, out, its stride.
    """
    return Kernel(_int4_body(block))
