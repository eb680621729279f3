"""Generates the products of a small batch with weights of a byte each, e4m3fn or int8.

Each weight is read once and decoded in registers. ``small_batch`` calls the kernels with tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from numba import njit
from numba.core import types

from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import words
from quantport_cpu.jit.simd import F16, F32, I8, I16, I32, I64, Simd, Value, cgutils, inline
from quantport_cpu.jit.target import host_target

TILE_ROWS = 2  # weight rows that one tile reads side by side
STEP = 64  # weights of one row in one step; activations are padded to it
PREFETCH_AHEAD = 8192  # bytes: past the page, where the processor's own prefetch ends
LANES = (host_target().pair_bits or 128) // 32  # fp32 numbers of a register
MAX_TILE_M = 8 if LANES == 16 else 4  # rows of x of a tile of fp8: its sums fit in the registers
DIGIT_ZERO = 0x808080  # an activation of zero: 128 in each of its three base-256 digits


def e4m3_to_fp16(simd: Simd, address: Value) -> Value:
    """32 e4m3fn codes as fp16 of value / 256, exactly.

    The exponent moves from bias 7 to bias 15; subnormals need nothing more.
    """
    wide = simd.widen(simd.load(I8, 32, address), I16, signed=True)
    return simd.bitcast(simd.int_op("and_", simd.int_op("shl", wide, 7), ~0x4000), F16)


def output_addresses(
    simd: Simd, out: Value, out_stride: Value, w_stride: Value, n_m: int
) -> Iterator[tuple[int, int, Value]]:
    """Where a tile stores the product of weight row r and row m of x: ``(r, m, address)`` of each.

    Where ``w_stride`` is 0 the weight rows are the same one, and so are their columns.
    """
    for r in range(TILE_ROWS):
        column = simd.b.select(simd.b.icmp_signed("==", w_stride, I64(0)), I64(0), I64(4 * r))
        for m in range(n_m):
            yield r, m, simd.at(simd.at(out, column), simd.b.mul(out_stride, I64(m)))


def _fp8_step(simd: Simd, x: Value, x_stride: Value, weights: list[Value], sums: list[list[Value]]) -> None:
    """Adds 64 products to each of ``sums[row * M + m]``, which are lists of partial sums."""
    n_m = len(sums) // len(weights)
    rows = [simd.at(x, simd.b.mul(x_stride, I64(m))) for m in range(n_m)]
    for part in range(0, STEP, 32):
        halves = [e4m3_to_fp16(simd, simd.at(address, part)) for address in weights]
        for i in range(0, 32, LANES):
            values = [simd.half_to_float(simd.shuffle(h, h, range(i, i + LANES))) for h in halves]
            for m, row in enumerate(rows):
                xs = simd.load(F32, LANES, simd.at(row, 4 * (part + i)))
                for r, value in enumerate(values):
                    parts = sums[r * n_m + m]
                    variable = parts[(part + i) // LANES % len(parts)]
                    simd.b.store(simd.intrinsic("fma", value, xs, simd.b.load(variable)), variable)


@inline(types.void, 10)
def fp8_tile(
    simd: Simd,
    x: Value,
    x_stride: Value,
    w: Value,
    w_stride: Value,
    k: Value,
    chunk: Value,
    scale: Value,
    scale_step: Value,
    out: Value,
    out_stride: Value,
    n_m: int,
) -> None:
    """Two weight rows times ``n_m`` rows of x, with a scale for every ``chunk`` columns.

    ``w_stride`` 0 repeats the row.
    """
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
            _fp8_step(simd, simd.at(x, simd.b.mul(place, I64(4))), x_stride, here, sums)
        with simd.remainder(length, STEP) as (start, size):
            place = simd.b.add(begin, start)
            for row, bounce in zip(rows, bounces, strict=True):
                simd.copy(bounce, simd.at(row, place), size)
            _fp8_step(simd, simd.at(x, simd.b.mul(place, I64(4))), x_stride, bounces, sums)
        index = simd.b.mul(simd.b.sdiv(begin, chunk), scale_step)
        factor = simd.b.fmul(simd.load(F32, 0, simd.at(scale, index)), F32(256.0))
        for total, parts in zip(totals, sums, strict=True):
            value = simd.sum([simd.b.load(part) for part in parts])
            simd.b.store(simd.intrinsic("fma", value, simd.splat(factor, LANES), simd.b.load(total)), total)
    for r, m, address in output_addresses(simd, out, out_stride, w_stride, n_m):
        simd.store(simd.reduce_lanes(simd.b.load(totals[r * n_m + m])), address)


@njit(error_model="numpy")
def fp8_rows(x, x_stride, m, w, n, k, first, span, chunk, scale, scale_step, out, out_stride):
    """``span`` weight rows from ``first`` on times ``m`` rows of x, at most 8, all with one row of scales."""
    for row in range(first, min(n, first + span), 2):
        stride = k if row + 1 < n else 0
        here, to, at, left = w + row * k, out + 4 * row, x, m
        while left > 0:
            size = min(left, MAX_TILE_M)
            # fmt: off
            if size == 8:
                fp8_tile(at, x_stride, here, stride, k, chunk, scale, scale_step, to, out_stride, 8)
            elif size >= 4:
                fp8_tile(at, x_stride, here, stride, k, chunk, scale, scale_step, to, out_stride, 4)
            elif size >= 2:
                fp8_tile(at, x_stride, here, stride, k, chunk, scale, scale_step, to, out_stride, 2)
            else:
                fp8_tile(at, x_stride, here, stride, k, chunk, scale, scale_step, to, out_stride, 1)
            # fmt: on
            size = 8 if size == 8 else 4 if size >= 4 else 2 if size >= 2 else 1
            at, to, left = at + size * x_stride, to + size * out_stride, left - size


def _fp8(frame):
    """A block is ``span`` weight rows, of one row of scales."""
    x, x_stride, w, n, k = words(frame, 2, 5)
    scale, scale_step, scale_stride, chunk = words(frame, 7, 4)
    out, out_stride, m, span = words(frame, 11, 4)
    while True:
        block = next_block(frame)
        if block >= block_count(frame):
            break
        first = block * span
        scales = scale + (first >> 7) * scale_stride
        fp8_rows(x, x_stride, m, w, n, k, first, span, chunk, scales, scale_step, out, out_stride)


def _join_digits(simd: Simd, weight_sum: Value, digit_sums: list[Value]) -> Value:
    """fp32 sum of products, from the exact sums of each digit and the sum of weights for their zero points.

    All of them are variables with 16 partial sums.
    """
    weights, *sums = (
        simd.reduce_lanes(simd.widen(simd.b.load(v), I64, signed=True)) for v in (weight_sum, *digit_sums)
    )
    value = simd.b.neg(simd.b.mul(weights, I64(DIGIT_ZERO)))
    for d, digit in enumerate(sums):
        value = simd.b.add(value, simd.b.shl(digit, I64(8 * d)))
    return simd.b.sitofp(value, F32)


@inline(types.void, 8)
def int8_tile(
    simd: Simd,
    x: Value,
    x_stride: Value,
    x_scale: Value,
    w: Value,
    w_stride: Value,
    k: Value,
    out: Value,
    out_stride: Value,
    n_m: int,
) -> None:
    """Two weight rows times ``n_m`` rows of x, each as three planes of u8 digits with zero point 128."""
    zero = simd.splat(0, 16, I32)
    sums = simd.variables(zero, TILE_ROWS * n_m * 3)
    weight_sums = simd.variables(zero, TILE_ROWS)
    ones = simd.splat(0x01010101, 16, I32)
    rows = [simd.at(w, simd.b.mul(w_stride, I64(r))) for r in range(TILE_ROWS)]
    plane = simd.b.udiv(x_stride, I64(3))

    def step(place: Value, weights: list[Value]) -> None:
        values = [simd.load(I32, 16, address) for address in weights]
        for value, variable in zip(values, weight_sums, strict=True):
            simd.b.store(simd.dot4(simd.b.load(variable), ones, value), variable)
        for md in range(3 * n_m):
            digit = simd.load(I32, 16, simd.at(simd.at(x, place), simd.b.mul(plane, I64(md))))
            for r, value in enumerate(values):
                variable = sums[r * n_m * 3 + md]
                simd.b.store(simd.dot4(simd.b.load(variable), digit, value), variable)

    with simd.steps(k, STEP) as i:
        here = [simd.at(row, i) for row in rows]
        for address in here:
            simd.prefetch(simd.at(address, PREFETCH_AHEAD))
        step(i, here)
    with simd.remainder(k, STEP) as (start, size):
        bounces = [simd.buffer(STEP) for _ in rows]
        for row, bounce in zip(rows, bounces, strict=True):
            simd.copy(bounce, simd.at(row, start), size)
        step(start, bounces)
    for r, m, address in output_addresses(simd, out, out_stride, w_stride, n_m):
        first = (r * n_m + m) * 3
        value = _join_digits(simd, weight_sums[r], sums[first : first + 3])
        simd.store(simd.b.fmul(value, simd.load(F32, 0, simd.at(x_scale, 4 * m))), address)


@njit(error_model="numpy")
def int8_rows(x, x_stride, x_scale, m, w, n, k, first, span, out, out_stride):
    """``span`` weight rows from ``first`` on times ``m`` rows of x."""
    for row in range(first, min(n, first + span), 2):
        stride = k if row + 1 < n else 0
        here, to, at, scale = w + row * k, out + 4 * row, x, x_scale
        for _ in range(m >> 1):
            int8_tile(at, x_stride, scale, here, stride, k, to, out_stride, 2)
            at, scale, to = at + 2 * x_stride, scale + 8, to + 2 * out_stride
        if m & 1:
            int8_tile(at, x_stride, scale, here, stride, k, to, out_stride, 1)


def _int8(frame):
    """A block is ``span`` weight rows."""
    x, x_stride, x_scale, w, n = words(frame, 2, 5)
    k, out, out_stride, m, span = words(frame, 7, 5)
    while True:
        block = next_block(frame)
        if block >= block_count(frame):
            break
        int8_rows(x, x_stride, x_scale, m, w, n, k, block * span, span, out, out_stride)


fp8_kernel = Kernel(_fp8)
int8_kernel = Kernel(_int8)
