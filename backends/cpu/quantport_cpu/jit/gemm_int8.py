"""Generates exact products of int8 activations with int8 weights, for any number of rows.

With VNNI an instruction adds four products u8 x s8 to each int32: weights become u8 by adding 128, and 128
times the sum of the activations is taken off at the end. Elsewhere bytes are widened to int16, whose products
are added in pairs. Either way sums of ``CHUNK`` columns fit in int32, and those of chunks are added in int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from numba.core import types

from quantport.backend import once
from quantport_cpu.jit.encode import quantize_int8_row
from quantport_cpu.jit.few_rows import SPAN, store_results
from quantport_cpu.jit.gemv_bytes import PREFETCH_AHEAD
from quantport_cpu.jit.jobs import JOB_BYTES
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block, take_slot
from quantport_cpu.jit.scalars import as_float, store_uint32, words
from quantport_cpu.jit.simd import F32, I8, I16, I32, I64, Simd, Value, cgutils, inline
from quantport_cpu.jit.target import host_target

TILE_M = 4  # rows of x of a tile
RESULTS = 4 * TILE_M * SPAN  # bytes of the results of a block
CHUNK = 1 << 16  # columns: 255 * 127 * CHUNK < 2**31
STEP = 64  # columns of activations are padded with zeros to a multiple of it


@cache
def activation_bytes() -> int:
    """Bytes of an activation in memory: 1 with VNNI, else 2."""
    return 1 if host_target().dot_bits else 2


@cache
def weight_rows() -> int:
    """Weight rows of a tile: its sums must fit in 32 registers of 512 bits, or in 16 of 256 or 128."""
    return 4 if host_target().pair_bits == 512 else 2


class _Dot:
    """A dot product of the target: how operands are loaded, and how a step of columns is added to a sum."""

    def __init__(self, simd: Simd) -> None:
        self.simd, self.vnni = simd, simd.target.dot_bits
        self.bits = self.vnni or simd.target.pair_bits or 128
        self.lanes = self.bits // 32
        self.step = self.lanes * (4 if self.vnni else 2)

    def weights(self, address: Value) -> Value:
        """A step of weights."""
        if self.vnni:
            return self.simd.int_op("xor", self.simd.load(I32, self.lanes, address), -0x7F7F7F80)
        return self.simd.widen(self.simd.load(I8, self.step, address), I16, signed=True)

    def activations(self, row: Value, column: Value) -> Value:
        """A step of activations."""
        if self.vnni:
            return self.simd.load(I32, self.lanes, self.simd.at(row, column))
        return self.simd.load(I16, self.step, self.simd.at(row, self.simd.b.shl(column, I64(1))))

    def add(self, total: Value, weights: Value, activations: Value) -> Value:
        """The sums with another step."""
        if self.vnni:
            return self.simd.dot_quads(total, weights, activations)
        return self.simd.b.add(total, self.simd.dot_pairs(weights, activations))


@inline(types.void, 11)
def tile(
    simd: Simd,
    x: Value,
    x_stride: Value,
    token: Value,
    sums: Value,
    w: Value,
    count: Value,
    k: Value,
    channel: Value,
    channel_step: Value,
    out: Value,
    out_stride: Value,
    n_m: int,
) -> None:
    """``count`` weight rows, up to ``weight_rows()``, times ``n_m`` rows of x, with the scales of both.

    In place of rows that are not there the last one is multiplied again.
    """
    dot = _Dot(simd)
    zero, n_rows = simd.splat(0, dot.lanes, I32), weight_rows()
    index = simd.rows_there(count, n_rows)
    rows = [simd.at(w, simd.b.mul(k, i)) for i in index]
    xs = [simd.at(x, simd.b.mul(x_stride, I64(m))) for m in range(n_m)]
    partial, totals = simd.variables(zero, n_rows * n_m), simd.variables(I64(0), n_rows * n_m)
    bounces = [simd.buffer(dot.step) for _ in rows]

    def step(column: Value, addresses: Sequence[Value]) -> None:
        weights = [dot.weights(address) for address in addresses]
        for m, row in enumerate(xs):
            activations = dot.activations(row, column)
            for r, value in enumerate(weights):
                variable = partial[r * n_m + m]
                simd.b.store(dot.add(simd.b.load(variable), value, activations), variable)

    with cgutils.for_range_slice(simd.b, I64(0), k, I64(CHUNK), I64) as (begin, _):
        left = simd.b.sub(k, begin)
        length = simd.b.select(simd.b.icmp_signed("<", left, I64(CHUNK)), left, I64(CHUNK))
        for variable in partial:
            simd.b.store(zero, variable)
        with simd.steps(length, dot.step) as i:
            column = simd.b.add(begin, i)
            here = [simd.at(row, column) for row in rows]
            for address in here:
                simd.prefetch(simd.at(address, PREFETCH_AHEAD))
            step(column, here)
        with simd.remainder(length, dot.step) as (start, size):
            column = simd.b.add(begin, start)
            for row, bounce in zip(rows, bounces, strict=True):
                simd.copy(bounce, simd.at(row, column), size)
            step(column, bounces)
        for part, total in zip(partial, totals, strict=True):
            whole = simd.b.sext(simd.reduce_lanes(simd.b.load(part)), I64)
            simd.b.store(simd.b.add(simd.b.load(total), whole), total)
    for r, i in enumerate(index):
        scale = simd.load(F32, 0, simd.at(channel, simd.b.mul(channel_step, i)))
        for m in range(n_m):
            value = simd.b.load(totals[r * n_m + m])
            if dot.vnni:
                sum_of_x = simd.b.sext(simd.load(I32, 0, simd.at(sums, 4 * m)), I64)
                value = simd.b.sub(value, simd.b.shl(sum_of_x, I64(7)))
            scaled = simd.b.fmul(simd.b.sitofp(value, F32), simd.load(F32, 0, simd.at(token, 4 * m)))
            address = simd.fp32_address(out, out_stride, I64(m), i)
            simd.store(simd.b.fmul(scaled, scale), address)


@inline(types.int64, 4)
def prepare_row(simd: Simd, codes: Value, to: Value, k: Value, width: Value, n_bytes: int) -> Value:
    """Copies ``k`` int8 to ``width`` integers of ``n_bytes``, the rest zeros; returns their sum."""
    (total,) = simd.variables(simd.splat(0, 16, I32), 1)
    buffer = simd.buffer(STEP)

    def move(source: Value, column: Value) -> None:
        for i in range(0, STEP, 16):
            value = simd.load(I8, 16, simd.at(source, i))
            simd.b.store(simd.b.add(simd.b.load(total), simd.widen(value, I32, signed=True)), total)
            place = simd.at(to, simd.b.mul(simd.b.add(column, I64(i)), I64(n_bytes)))
            simd.store(value if n_bytes == 1 else simd.widen(value, I16, signed=True), place)

    with simd.steps(k, STEP) as column:
        move(simd.at(codes, column), column)
    with simd.remainder(k, STEP) as (start, size):
        simd.copy(buffer, simd.at(codes, start), size)
        move(buffer, start)
    return simd.b.sext(simd.reduce_lanes(simd.b.load(total)), I64)


def _prepare_body(n_bytes: int) -> Any:
    def rows(frame):
        codes, codes_stride, k, to, width, sums = words(frame, 2, 6)
        source, source_stride, scales, half_range = words(frame, 8, 4)
        while True:
            row = next_block(frame)
            if row >= block_count(frame):
                break
            here = codes + row * codes_stride
            if source != 0:
                quantize_int8_row(source + row * source_stride, k, here, scales, row, as_float(half_range))
            store_uint32(sums, row, prepare_row(here, to + row * width * n_bytes, k, width, n_bytes))

    return rows


@once
def prepare_kernel() -> Kernel:
    """Brings activations into the form that ``kernel`` reads: quantizes bf16, where there are some, to int8
    codes first. A block is a row.

    Words: codes (of one byte they may be where they go), their stride, k, where they go, columns there (a
    multiple of ``STEP``), sums int32; bf16 or 0, its stride, scales, bits of the half range.
    """
    return Kernel(_prepare_body(activation_bytes()))


def slot_bytes(k: int, rows: int) -> int:
    """Bytes of a slot of ``kernel``, with ``rows`` of activations that a thread quantizes."""
    columns = -(-k // STEP) * STEP
    return RESULTS + (8 * rows + rows * columns * activation_bytes() + columns if rows else 0)


def _body(n_rows: int, n_bytes: int) -> Any:
    def rows(frame):
        table, blocks_per_job, w, n, k, channel, channel_step, channels = words(frame, 2, 8)
        x, x_stride, token, sums, out, width, is_bf16 = words(frame, 10, 7)
        source, source_stride, count, half_range = words(frame, 17, 4)
        slot = take_slot(frame)
        if source != 0:
            token, sums, x = slot + RESULTS, slot + RESULTS + 4 * count, slot + RESULTS + 8 * count
            codes = x + count * x_stride
            for i in range(count):
                quantize_int8_row(source + i * source_stride, k, codes, token, i, as_float(half_range))
                store_uint32(sums, i, prepare_row(codes, x + i * x_stride, k, x_stride // n_bytes, n_bytes))
        while True:
            block = next_block(frame)
            if block >= block_count(frame):
                break
            i, stop, number, column = words(table + JOB_BYTES * (block // blocks_per_job), 0, 4)
            first = block % blocks_per_job * SPAN
            last = min(n, first + SPAN)
            weight, scales = w + number * n * k, channel + number * channels
            while i < stop:
                left, at, t, total = stop - i, x + i * x_stride, token + 4 * i, sums + 4 * i
                size = 4 if left >= 4 else 2 if left >= 2 else 1
                place = i * width + column + first
                to, stride = (slot, 4 * SPAN) if is_bf16 else (out + 4 * place, 4 * width)
                for row in range(first, last, n_rows):
                    here, scale, y = weight + row * k, scales + row * channel_step, to + 4 * (row - first)
                    c = min(n_rows, n - row)
                    if size == 4:
                        tile(at, x_stride, t, total, here, c, k, scale, channel_step, y, stride, 4)
                    elif size == 2:
                        tile(at, x_stride, t, total, here, c, k, scale, channel_step, y, stride, 2)
                    else:
                        tile(at, x_stride, t, total, here, c, k, scale, channel_step, y, stride, 1)
                if is_bf16:
                    store_results(slot, size, out, place, width, last - first, True)
                i += size

    return rows


@once
def kernel() -> Kernel:
    """The kernel, over jobs. A block is ``SPAN`` rows of the weight of a job.

    Activations come as ``prepare_kernel`` writes them, or as a few rows of bf16, which every thread quantizes
    for itself; results are fp32 or bf16.

    Words: jobs, blocks of a job, weights, n, k, scales of channels, bytes from one to the next and from
    weight to weight, activations, their stride, their scales, their sums, out, its columns, whether it is
    bf16; rows of bf16 or 0, their stride, their number, bits of the half range.
    """
    return Kernel(_body(weight_rows(), activation_bytes()))
