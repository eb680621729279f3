"""Generates products of fp32 activations with int4 weights, which are decoded some columns at a time.

A thread decodes ``COLUMNS`` columns of four weight rows into memory that stays in its first cache, and
multiplies all rows of activations by them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite.ir import ArrayType  # llvmlite has no types
from numba.core import types

from quantport.backend import once
from quantport_cpu.jit import factors
from quantport_cpu.jit.gemv_bytes import PREFETCH_AHEAD
from quantport_cpu.jit.jobs import JOB_BYTES
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import words
from quantport_cpu.jit.simd import F32, I8, I16, I32, I64, Simd, Value, inline
from quantport_cpu.jit.target import host_target

COLUMNS = 1024
ROWS = 4  # weight rows of a tile
STEP = 32  # columns; activations are padded with zeros to a multiple of it
_CHUNK = 128  # columns that are decoded in a step, at most


@cache
def _lanes() -> int:
    return 16 if host_target().pair_bits == 512 else 8


@cache
def tile_rows() -> int:
    """Rows of activations of a tile: its sums must fit in 32 registers of 512 bits, or in 16 of 256."""
    return {512: 4, 256: 3}.get(host_target().pair_bits, 2)


@inline(types.int64)
def panel_memory(simd: Simd) -> Value:
    """Memory for the decoded columns of ``ROWS`` weight rows."""
    with simd.b.goto_entry_block():  # numba's own function writes a zero to every byte
        slot = simd.b.alloca(ArrayType(I8, 4 * ROWS * COLUMNS))
    slot.align = 64
    return simd.b.ptrtoint(slot, I64)


class _Decoder:
    """Writes 32 columns or more of one group as numbers of ``n_bytes``: 4 as fp32, 2 as bf16."""

    def __init__(self, simd: Simd, n_bytes: int, n_factor: int) -> None:
        self.simd, self.n_bytes, self.n_factor = simd, n_bytes, n_factor
        self.lanes = _lanes() if n_bytes == 4 else 16
        self.shifts = simd.constant([4 * (i % 8) for i in range(self.lanes)], I32)
        self.codes = simd.constant([float(i - 8) for i in range(16)], F32)

    def write(self, source: Value, scale: Value, zero: Value | None, to: Value, size: int) -> None:
        """``size`` columns, with the scale at an address, and the offset if there is one."""
        s, lanes = self.simd, self.lanes
        factor, offset = (
            s.splat(0.0, 16, F32) if a is None else factors.spread(s, self.n_factor, 1, a, [0] * 16)
            for a in (scale, zero)
        )
        table = s.intrinsic("fma", self.codes, factor, offset)
        if self.n_bytes == 2:
            table = s.bitcast(s.bf16_bits(table), F32)
        factor, low = (s.shuffle(v, v, order) for v, order in ((factor, range(lanes)), (table, [0] * lanes)))
        for i in range(0, size, lanes):
            loaded = s.load(I32, lanes // 8, s.at(source, i // 2))
            index = s.b.lshr(s.shuffle(loaded, loaded, [j // 8 for j in range(lanes)]), self.shifts)
            if lanes == 16:
                value = s.look_up(table, index)
            else:  # a table of 16 takes more instructions
                value = s.intrinsic("fma", s.int_to_float(s.int_op("and_", index, 15)), factor, low)
            if self.n_bytes == 2:
                value = s.narrow(s.bitcast(value, I32), I16)
            s.store(value, s.at(to, self.n_bytes * i))


@inline(types.void, 6, 7, 8, 9)
def decode_columns(
    simd: Simd,
    w: Value,
    scale: Value,
    zero: Value,
    first: Value,
    stop: Value,
    to: Value,
    n_group: int,
    n_zero: int,
    n_factor: int,
    n_bytes: int,
) -> None:
    """Columns ``first`` to ``stop`` of a weight row, and finite numbers up to a whole step."""
    decoder, chunk, bounce = _Decoder(simd, n_bytes, n_factor), min(n_group, _CHUNK), simd.buffer(STEP // 2)

    def decode(source: Value, column: Value, size: int) -> None:
        group = simd.b.mul(simd.b.udiv(column, I64(n_group)), I64(factors.BYTES[n_factor]))
        place = simd.at(to, simd.b.mul(simd.b.sub(column, first), I64(n_bytes)))
        offset = simd.at(zero, group) if n_zero else None
        decoder.write(source, simd.at(scale, group), offset, place, size)

    count = simd.b.sub(stop, first)
    with simd.steps(count, chunk) as i:
        column = simd.b.add(first, i)
        here = simd.at(w, simd.b.lshr(column, I64(1)))
        simd.prefetch(simd.at(here, PREFETCH_AHEAD))
        decode(here, column, chunk)
    rest = simd.b.and_(count, I64(chunk - 1))
    with simd.steps(simd.b.add(rest, I64(STEP - 1)), STEP) as i:
        column, left = simd.b.add(simd.b.sub(stop, rest), i), simd.b.sub(rest, i)
        left = simd.b.select(simd.b.icmp_signed("<", left, I64(STEP)), left, I64(STEP))
        left = simd.b.lshr(simd.b.add(left, I64(1)), I64(1))
        simd.copy(bounce, simd.at(w, simd.b.lshr(column, I64(1))), left)
        decode(bounce, column, STEP)


@inline(types.void, 6, 7)
def tile(
    simd: Simd,
    x: Value,
    x_stride: Value,
    panel: Value,
    count: Value,
    out: Value,
    out_stride: Value,
    n_rows: int,
    n_m: int,
) -> None:
    """Adds the products of ``n_rows`` decoded rows and ``n_m`` rows of x, over ``count`` columns."""
    lanes = _lanes()
    sums = [simd.variables(simd.splat(0.0, lanes, F32), n_rows) for _ in range(n_m)]
    xs = [simd.at(x, simd.b.mul(x_stride, I64(m))) for m in range(n_m)]
    with simd.steps(count, lanes) as column:
        at = simd.b.shl(column, I64(2))
        values = [simd.load(F32, lanes, simd.at(row, at)) for row in xs]
        for r in range(n_rows):
            weight = simd.load(F32, lanes, simd.at(simd.at(panel, 4 * COLUMNS * r), at))
            for value, totals in zip(values, sums, strict=True):
                simd.b.store(simd.intrinsic("fma", weight, value, simd.b.load(totals[r])), totals[r])
    for m, totals in enumerate(sums):
        address = simd.at(out, simd.b.mul(out_stride, I64(m)))
        total = simd.reduce_each([simd.b.load(t) for t in totals])
        simd.store(simd.b.fadd(simd.load(F32, n_rows, address), total), address)


def _body(group: int, n_zero: int, factor: int, most: int) -> Callable[[Any], None]:
    factor_bytes = factors.BYTES[factor]

    def rows(frame):
        table, blocks_per_job, weights, scales, zeros, n, k = words(frame, 2, 7)
        values, x_stride, results, width, span = words(frame, 9, 5)
        out_stride = 4 * width
        w_stride, scale_stride = (k + 7) // 8 * 4, (k + group - 1) // group * factor_bytes
        panel = panel_memory()
        while True:
            block = next_block(frame)
            if block >= block_count(frame):
                break
            first = block % blocks_per_job * span
            start, end, number, left = words(table + JOB_BYTES * (block // blocks_per_job), 0, 4)
            x, out, m = values + start * x_stride, results + start * out_stride + 4 * left, end - start
            w, place = weights + number * n * w_stride, number * n * scale_stride
            scale, zero = scales + place, zeros + place
            for column in range(0, k, COLUMNS):
                stop = min(k, column + COLUMNS)
                count = (stop - column + STEP - 1) // STEP * STEP
                for row in range(first, min(n, first + span), ROWS):
                    height = min(ROWS, n - row)
                    for r in range(height):
                        s, z = scale + (row + r) * scale_stride, zero + (row + r) * scale_stride
                        to = panel + 4 * COLUMNS * r
                        here = w + (row + r) * w_stride
                        decode_columns(here, s, z, column, stop, to, group, n_zero, factor, 4)
                    i = 0
                    while i < m:
                        at, y = x + i * x_stride + 4 * column, out + i * out_stride + 4 * row
                        if height < ROWS:
                            for r in range(height):
                                tile(
                                    at, x_stride, panel + 4 * COLUMNS * r, count, y + 4 * r, out_stride, 1, 1
                                )
                            i += 1
                        elif m - i >= most:
                            tile(at, x_stride, panel, count, y, out_stride, ROWS, most)
                            i += most
                        else:
                            tile(at, x_stride, panel, count, y, out_stride, ROWS, 1)
                            i += 1

    return rows


@once
def kernel(group: int, has_zero: bool, factor: int) -> Kernel:
    """The kernel of one group size and one dtype of scales (``factors``), over jobs. A block is ``span`` rows
    of the weight of a job.

    Words: jobs, blocks of a job, codes, scales, offsets or 0, n, k, x fp32, filled up with zeros to a
    multiple of ``STEP``, its stride, out, to which products are added, its columns, span.
    """
    return Kernel(_body(group, int(has_zero), factor, tile_rows()))
