"""Generates the products of a small batch with weights in blocks of GGUF, as they are stored.

A kernel without activations writes the decoded weights, for a matmul. A weight is ``code * step - low``, in
one rounding, as ``numerics.gguf`` computes it. Layouts: ggml ``ggml-common.h``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba.core import types

from quantport.backend import once
from quantport_cpu.jit.gemv_blocks import BF16, FP32
from quantport_cpu.jit.gemv_bytes import PREFETCH_AHEAD
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import words
from quantport_cpu.jit.simd import F16, F32, I8, I16, I32, I64, Simd, Value, cgutils, inline
from quantport_cpu.jit.target import host_target

Q4_0, Q8_0, Q4_K, Q5_K, Q6_K, Q4_1, Q5_0, Q5_1 = range(8)
NUMBERS = {
    "q4_0": Q4_0,
    "q8_0": Q8_0,
    "q4_k": Q4_K,
    "q5_k": Q5_K,
    "q6_k": Q6_K,
    "q4_1": Q4_1,
    "q5_0": Q5_0,
    "q5_1": Q5_1,
}
COLUMNS = (32, 32, 256, 256, 256, 32, 32, 32)  # of a block
BYTES = (18, 34, 144, 176, 210, 20, 22, 24)
_LOWEST = {Q4_0: -8.0, Q5_0: -16.0}  # value of code 0, in steps; other types of 32 store it
LANES = 16
TILE_M = 4


class _Run:
    """16 codes of a block as int32, and what turns them into weights, both in every lane."""

    def __init__(self, codes: Value, step: Value, low: Value | None) -> None:
        self.codes, self.step, self.low = codes, step, low

    def weights(self, simd: Simd) -> Value:
        """The weights as fp32."""
        values = simd.int_to_float(self.codes)
        if self.low is None:
            return simd.b.fmul(values, self.step)
        return simd.intrinsic("fma", values, self.step, self.low)


def _half(simd: Simd, address: Value) -> Value:
    """The fp16 at an address as fp32."""
    return simd.b.fpext(simd.load(F16, 0, address), F32)


def _codes(simd: Simd, address: Value, signed: bool = False) -> Value:
    """16 bytes as int32."""
    return simd.widen(simd.load(I8, LANES, address), I32, signed)


def _nibbles(simd: Simd, address: Value, high: bool) -> Value:
    """The low or the high nibbles of 16 bytes, as int32."""
    wide = _codes(simd, address)
    return simd.int_op("lshr", wide, 4) if high else simd.int_op("and_", wide, 15)


def _bits(simd: Simd, address: Value, first: int, count: int) -> Value:
    """``count`` bits from bit ``first`` on of 16 bytes, as bits 4 and up of int32."""
    chosen = simd.int_op("and_", _codes(simd, address), ((1 << count) - 1) << first)
    return simd.int_op("shl" if first < 4 else "lshr", chosen, abs(4 - first)) if first != 4 else chosen


def _scales(simd: Simd, block: Value) -> tuple[Value, Value]:
    """Step, and the negated offset, of the eight sub-blocks of a block of q4_k or q5_k."""
    a, b, c = (simd.widen(simd.load(I8, 4, simd.at(block, at)), I32) for at in (4, 8, 12))

    def joined(low: Value, rest: Value) -> Value:
        top = simd.int_op("shl", simd.int_op("lshr", low, 6), 4)
        return simd.shuffle(simd.int_op("and_", low, 63), simd.b.or_(rest, top), range(8))

    step, low = joined(a, simd.int_op("and_", c, 15)), joined(b, simd.int_op("lshr", c, 4))
    d, least = _half(simd, block), simd.b.fneg(_half(simd, simd.at(block, 2)))
    return tuple(simd.b.fmul(simd.int_to_float(v), simd.splat(f, 8)) for v, f in ((step, d), (low, least)))


def _runs(simd: Simd, block: Value, n_type: int) -> Iterator[_Run]:
    """The codes of a block, 16 columns after 16 columns."""
    if n_type in (Q4_0, Q4_1, Q5_0, Q5_1):
        yield from _runs_of_nibbles(simd, block, n_type)
    elif n_type == Q8_0:
        step = simd.splat(_half(simd, block), LANES)
        yield from (_Run(_codes(simd, simd.at(block, 2 + LANES * i), True), step, None) for i in (0, 1))
    elif n_type == Q6_K:
        yield from _runs_q6_k(simd, block)
    else:
        yield from _runs_with_offsets(simd, block, n_type)


def _runs_of_nibbles(simd: Simd, block: Value, n_type: int) -> Iterator[_Run]:
    """Types of 32 with 4 bits, and with 5, whose fifth bits are in four bytes before the nibbles."""
    d, codes = _half(simd, block), BYTES[n_type] - LANES
    lowest = _LOWEST.get(n_type)
    low = _half(simd, simd.at(block, 2)) if lowest is None else simd.b.fmul(d, F32(lowest))
    for high in (False, True):
        values = _nibbles(simd, simd.at(block, codes), high)
        if n_type in (Q5_0, Q5_1):
            values = simd.b.or_(values, _fifth_bits(simd, simd.at(block, codes - 4 + 2 * high)))
        yield _Run(values, simd.splat(d, LANES), simd.splat(low, LANES))


def _fifth_bits(simd: Simd, address: Value) -> Value:
    """16 bits, the lowest first, as bit 4 of int32."""
    wide = simd.splat(simd.b.zext(simd.load(I16, 0, address), I32), LANES)
    each = simd.b.lshr(wide, ir.Constant(wide.type, list(range(LANES))))
    return simd.int_op("shl", simd.int_op("and_", each, 1), 4)


def _runs_with_offsets(simd: Simd, block: Value, n_type: int) -> Iterator[_Run]:
    """q4_k and q5_k: eight sub-blocks of 32; q5_k has a fifth bit of each code in 32 bytes of their own."""
    steps, lows = _scales(simd, block)
    nibbles = 48 if n_type == Q5_K else 16
    for sub in range(8):
        step, low = (simd.shuffle(v, v, [sub] * LANES) for v in (steps, lows))
        for i in (0, LANES):
            codes = _nibbles(simd, simd.at(block, nibbles + 32 * (sub // 2) + i), sub % 2 == 1)
            if n_type == Q5_K:
                codes = simd.b.or_(codes, _bits(simd, simd.at(block, 16 + i), sub, 1))
            yield _Run(codes, step, low)


def _runs_q6_k(simd: Simd, block: Value) -> Iterator[_Run]:
    """Two halves of four runs of 32; 16 columns share a scale; codes are stored plus 32."""
    d = simd.splat(_half(simd, simd.at(block, 208)), LANES)
    steps = simd.b.fmul(simd.int_to_float(_codes(simd, simd.at(block, 192), signed=True)), d)
    for run in range(16):
        half, part, i = run // 8, run % 8 // 2, LANES * (run % 2)
        low = _nibbles(simd, simd.at(block, 64 * half + 32 * (part % 2) + i), part >= 2)
        high = _bits(simd, simd.at(block, 128 + 32 * half + i), 2 * part, 2)
        step = simd.shuffle(steps, steps, [run] * LANES)
        yield _Run(simd.b.or_(low, high), step, simd.b.fmul(step, simd.splat(-32.0, LANES, F32)))


def tile_rows(n_type: int) -> int:
    """Weight rows of a tile, which share up to ``TILE_M`` rows of x: as many as 32 registers of 512 bits hold
    with their scales, or 16 of 256.
    """
    return 1 if host_target().pair_bits < 512 else 2 if n_type == Q6_K else 4


@inline(types.void, 7, 8)
def tile(
    simd: Simd,
    x: Value,
    x_stride: Value,
    w: Value,
    count: Value,
    blocks: Value,
    out: Value,
    out_stride: Value,
    n_type: int,
    n_m: int,
) -> None:
    """``count`` weight rows, up to ``tile_rows``, times ``n_m`` rows of x.

    In place of rows that are not there the last one is multiplied again.
    """
    index, size = simd.rows_there(count, tile_rows(n_type)), simd.b.mul(blocks, I64(BYTES[n_type]))
    rows = [simd.at(w, simd.b.mul(size, i)) for i in index]
    sums = [simd.variables(simd.splat(0.0, LANES, F32), n_m) for _ in rows]
    with cgutils.for_range_slice(simd.b, I64(0), blocks, I64(1), I64) as (b, _):
        offset = simd.b.mul(b, I64(BYTES[n_type]))
        here = [simd.at(row, offset) for row in rows]
        for block in here:
            for at in range(0, BYTES[n_type], 64):
                simd.prefetch(simd.at(block, PREFETCH_AHEAD + at))
        column = simd.at(x, simd.b.mul(b, I64(4 * COLUMNS[n_type])))
        xs = [simd.at(column, simd.b.mul(x_stride, I64(m))) for m in range(n_m)]
        for i, runs in enumerate(zip(*(_runs(simd, block, n_type) for block in here), strict=True)):
            values = [simd.load(F32, LANES, simd.at(row, 4 * LANES * i)) for row in xs]
            for run, totals in zip(runs, sums, strict=True):
                weights = run.weights(simd)
                for value, total in zip(values, totals, strict=True):
                    simd.b.store(simd.intrinsic("fma", weights, value, simd.b.load(total)), total)
    for i, totals in zip(index, sums, strict=True):
        for m, total in enumerate(totals):
            address = simd.fp32_address(out, out_stride, I64(m), i)
            simd.store(simd.reduce_lanes(simd.b.load(total)), address)


@inline(types.void, 3, 4)
def decode_row(simd: Simd, w: Value, blocks: Value, out: Value, n_type: int, n_bytes: int) -> None:
    """One weight row, in ``n_bytes``: 4 as fp32, 2 as bf16."""
    with cgutils.for_range_slice(simd.b, I64(0), blocks, I64(1), I64) as (b, _):
        block = simd.at(w, simd.b.mul(b, I64(BYTES[n_type])))
        to = simd.at(out, simd.b.mul(b, I64(n_bytes * COLUMNS[n_type])))
        store = simd.store if n_bytes == 4 else simd.store_bf16
        for i, run in enumerate(_runs(simd, block, n_type)):
            store(run.weights(simd), simd.at(to, n_bytes * LANES * i))


def _body(n_type: int, size: int, columns: int, n_rows: int) -> Any:
    def rows(frame):
        x, x_stride, w, n, blocks = words(frame, 2, 5)
        out, out_stride, m, span = words(frame, 7, 4)
        while True:
            block = next_block(frame)
            if block >= block_count(frame):
                break
            for row in range(block * span, min(n, block * span + span), 1 if m <= 0 else n_rows):
                here, y, count = w + row * blocks * size, out + 4 * row, min(n_rows, n - row)
                if m == FP32:
                    decode_row(here, blocks, out + 4 * columns * blocks * row, n_type, 4)
                elif m == BF16:
                    decode_row(here, blocks, out + 2 * columns * blocks * row, n_type, 2)
                i = 0
                while i < m:
                    at, to = x + i * x_stride, y + i * out_stride
                    if m - i >= TILE_M:
                        tile(at, x_stride, here, count, blocks, to, out_stride, n_type, TILE_M)
                        i += TILE_M
                    elif m - i >= 2:
                        tile(at, x_stride, here, count, blocks, to, out_stride, n_type, 2)
                        i += 2
                    else:
                        tile(at, x_stride, here, count, blocks, to, out_stride, n_type, 1)
                        i += 1

    return rows


@once
def kernel(name: str) -> Kernel:
    """The kernel of one block type. A block of the loop is ``span`` weight rows.

    In place of rows of x it takes ``FP32`` or ``BF16``: then the weights themselves are written. Words: x,
    its stride, weights, n, blocks of a row, out, its stride, rows of x, span.
    """
    number = NUMBERS[name]
    return Kernel(_body(number, BYTES[number], COLUMNS[number], tile_rows(number)))
