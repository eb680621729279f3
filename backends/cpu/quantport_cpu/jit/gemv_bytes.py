"""Generates the products of a small batch with weights of a byte each, e4m3fn or int8, in fp32.

Each weight is read once and decoded in registers. ``small_batch`` calls the kernels with tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from numba.core import types

from quantport.backend import once
from quantport_cpu.jit.few_rows import SPAN, scale_results, store_results, widen_row
from quantport_cpu.jit.jobs import JOB_BYTES
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block, take_slot
from quantport_cpu.jit.scalars import words
from quantport_cpu.jit.simd import F16, F32, I8, I16, I32, I64, Simd, Value, cgutils, inline
from quantport_cpu.jit.target import host_target

E4M3, INT8 = 0, 1
UNIT = (256.0, 1.0)  # what decoded weights are divided by
TILE_ROWS = 2  # weight rows that one tile reads side by side
STEP = 64  # weights of one row in one step; activations are padded to it
PREFETCH_AHEAD = 8192  # bytes: past the page, where the processor's own prefetch ends
LANES = (host_target().pair_bits or 128) // 32  # fp32 numbers of a register
MAX_TILE_M = 8 if LANES == 16 else 4  # rows of x of a tile: its sums fit in the registers
RESULTS = 4 * MAX_TILE_M * SPAN  # bytes of the results of a block


def fp8_to_fp16(simd: Simd, codes: Value, exponent: int) -> Value:
    """Codes of e4m3fn or e5m2, by their exponent bits, as fp16 of value / ``fp8_factor``, exactly.

    The exponent moves from bias 7 to bias 15, where it is not 15 already; subnormals need nothing more.
    """
    if exponent == 5:
        return simd.bitcast(simd.int_op("shl", simd.widen(codes, I16), 8), F16)
    wide = simd.int_op("shl", simd.widen(codes, I16, signed=True), 7)
    return simd.bitcast(simd.int_op("and_", wide, ~0x4000), F16)


def fp8_factor(exponent: int) -> float:
    """What the fp16 of ``fp8_to_fp16`` are to be multiplied by; 1 for formats that are no float."""
    return 256.0 if exponent == 4 else 1.0


def e4m3_to_fp16(simd: Simd, address: Value) -> Value:
    """32 e4m3fn codes as fp16 of value / 256, exactly."""
    return fp8_to_fp16(simd, simd.load(I8, 32, address), 4)


def output_addresses(
    simd: Simd, out: Value, out_stride: Value, w_stride: Value, n_rows: int, n_m: int
) -> Iterator[tuple[int, int, Value]]:
    """Where a tile stores the product of weight row r and row m of x: ``(r, m, address)`` of each.

    Where ``w_stride`` is 0 the weight rows are the same one, and so are their columns.
    """
    for r in range(n_rows):
        column = simd.b.select(simd.b.icmp_signed("==", w_stride, I64(0)), I64(0), I64(4 * r))
        for m in range(n_m):
            yield r, m, simd.at(simd.at(out, column), simd.b.mul(out_stride, I64(m)))


def _decoded(simd: Simd, address: Value, n_format: int) -> Iterator[Value]:
    """32 weights over ``UNIT``, ``LANES`` at a time."""
    if n_format == INT8:
        for i in range(0, 32, LANES):
            codes = simd.load(I8, LANES, simd.at(address, i))
            yield simd.int_to_float(simd.widen(codes, I32, signed=True))
        return
    halves = e4m3_to_fp16(simd, address)
    for i in range(0, 32, LANES):
        yield simd.half_to_float(simd.shuffle(halves, halves, range(i, i + LANES)))


def _step(
    simd: Simd, x: Value, x_stride: Value, weights: list[Value], sums: list[list[Value]], n_format: int
) -> None:
    """Adds 64 products to each of ``sums[row * M + m]``, which are lists of partial sums."""
    n_m = len(sums) // len(weights)
    rows = [simd.at(x, simd.b.mul(x_stride, I64(m))) for m in range(n_m)]
    for part in range(0, STEP, 32):
        decoded = zip(*(_decoded(simd, simd.at(w, part), n_format) for w in weights), strict=True)
        for i, values in enumerate(decoded):
            for m, row in enumerate(rows):
                xs = simd.load(F32, LANES, simd.at(row, 4 * (part + LANES * i)))
                for r, value in enumerate(values):
                    parts = sums[r * n_m + m]
                    variable = parts[(part // LANES + i) % len(parts)]
                    simd.b.store(simd.intrinsic("fma", value, xs, simd.b.load(variable)), variable)


@inline(types.void, 11, 12)
def tile(
    simd: Simd,
    x: Value,
    x_stride: Value,
    w: Value,
    w_stride: Value,
    k: Value,
    chunk: Value,
    scale: Value,
    scale_step: Value,
    scale_row: Value,
    out: Value,
    out_stride: Value,
    n_format: int,
    n_m: int,
) -> None:
    """Two weight rows times ``n_m`` rows of x, with a scale for every ``chunk`` columns: of both rows, or of
    each where ``scale_row`` bytes lie between them.

    ``w_stride`` 0 repeats the row.
    """
    is_one = simd.b.icmp_signed("==", w_stride, I64(0))
    second = simd.b.select(is_one, I64(0), scale_row)
    zero = simd.splat(0.0, LANES, F32)
    totals = simd.variables(zero, TILE_ROWS * n_m)
    sums = [simd.variables(zero, max(1, 4 // n_m)) for _ in totals]
    rows = [simd.at(w, simd.b.mul(w_stride, I64(r))) for r in range(TILE_ROWS)]
    bounces = [simd.buffer(STEP) for _ in rows]
    with cgutils.for_range_slice(simd.b, I64(0), k, chunk, I64) as (begin, _):
        for part in chain.from_iterable(sums):
            simd.b.store(zero, part)
        left = simd.b.sub(k, begin)
        length = simd.b.select(simd.b.icmp_signed("<", left, chunk), left, chunk)
        with simd.steps(length, STEP) as i:
            place = simd.b.add(begin, i)
            here = [simd.at(row, place) for row in rows]
            for address in here:
                simd.prefetch(simd.at(address, PREFETCH_AHEAD))
            _step(simd, simd.at(x, simd.b.mul(place, I64(4))), x_stride, here, sums, n_format)
        with simd.remainder(length, STEP) as (start, size):
            place = simd.b.add(begin, start)
            for row, bounce in zip(rows, bounces, strict=True):
                simd.copy(bounce, simd.at(row, place), size)
            _step(simd, simd.at(x, simd.b.mul(place, I64(4))), x_stride, bounces, sums, n_format)
        index = simd.b.mul(simd.b.sdiv(begin, chunk), scale_step)
        factors = [
            simd.b.fmul(simd.load(F32, 0, simd.at(simd.at(scale, index), offset)), F32(UNIT[n_format]))
            for offset in (I64(0), second)
        ]
        for i, (total, parts) in enumerate(zip(totals, sums, strict=True)):
            value, factor = simd.sum([simd.b.load(part) for part in parts]), factors[i // n_m]
            simd.b.store(simd.intrinsic("fma", value, simd.splat(factor, LANES), simd.b.load(total)), total)
    for r, m, address in output_addresses(simd, out, out_stride, w_stride, TILE_ROWS, n_m):
        simd.store(simd.reduce_lanes(simd.b.load(totals[r * n_m + m])), address)


def slot_bytes(k: int, rows: int) -> int:
    """Bytes of a slot of ``kernel``, with ``rows`` of activations that a thread widens."""
    return RESULTS + 4 * rows * -(-k // STEP) * STEP


def _body(n_format: int) -> Any:
    def blocks(frame):
        table, blocks_per_job, w, n, k, scales, scale_step = words(frame, 2, 7)
        scale_stride, chunk, scale_rows, channel, channel_step, channels = words(frame, 9, 6)
        x, x_stride, out, width, is_bf16, source, source_stride, count = words(frame, 15, 8)
        scale_row = scale_stride if scale_rows == 1 else 0
        slot = take_slot(frame)
        if source != 0:
            x = slot + RESULTS
            for i in range(count):
                widen_row(source + i * source_stride, x + i * x_stride, k, x_stride >> 2)
        while True:
            block = next_block(frame)
            if block >= block_count(frame):
                break
            i, stop, number, column = words(table + JOB_BYTES * (block // blocks_per_job), 0, 4)
            first = block % blocks_per_job * SPAN
            last = min(n, first + SPAN)
            weight = w + number * n * k
            rows = (n + scale_rows - 1) // scale_rows  # of scales of a weight
            s = scales + (number * rows + first // scale_rows) * scale_stride
            c = channel + number * channels + first * channel_step
            while i < stop:
                left, at = stop - i, x + i * x_stride
                size = MAX_TILE_M if left >= MAX_TILE_M else 4 if left >= 4 else 2 if left >= 2 else 1
                for row in range(first, last, TILE_ROWS):
                    stride = k if row + 1 < n else 0
                    here, to = weight + row * k, slot + 4 * (row - first)
                    t = s + (row - first) * scale_row
                    # fmt: off
                    if size == 8:
                        tile(at, x_stride, here, stride, k, chunk, t, scale_step, scale_row,
                             to, 4 * SPAN, n_format, 8)
                    elif size == 4:
                        tile(at, x_stride, here, stride, k, chunk, t, scale_step, scale_row,
                             to, 4 * SPAN, n_format, 4)
                    elif size == 2:
                        tile(at, x_stride, here, stride, k, chunk, t, scale_step, scale_row,
                             to, 4 * SPAN, n_format, 2)
                    else:
                        tile(at, x_stride, here, stride, k, chunk, t, scale_step, scale_row,
                             to, 4 * SPAN, n_format, 1)
                    # fmt: on
                for m in range(size):
                    scale_results(slot + 4 * SPAN * m, c, channel_step, last - first)
                store_results(slot, size, out, i * width + column + first, width, last - first, is_bf16)
                i += size

    return blocks


@once
def kernel(n_format: int) -> Kernel:
    """The kernel of one format, over jobs. A block is ``SPAN`` rows of the weight of a job.

    Activations come as fp32, filled up with zeros to a multiple of ``STEP``, or as a few rows of bf16, which
    every thread widens for itself; results are fp32 or bf16.

    Words: jobs, blocks of a job, weights, n, k, scales of blocks, the bytes from one to the next and from row
    to row of them, the columns and the rows of one (1, or a multiple of ``SPAN``), scales of channels, the
    bytes from one to the next and from weight to weight, activations, their stride, out, its columns, whether
    it is bf16; rows of bf16 or 0, their stride, their number.
    """
    return Kernel(_body(n_format))
