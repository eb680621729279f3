"""Generates the products of a small batch with weights in small floats or code books with block scales.

A kernel without activations writes the decoded weights, for a matmul. 32 weights become two vectors of 16
fp32: 4-bit codes through a table in one register, 6- and 8-bit floats as the fp16 of the same bits, which is
smaller by a power of two that the caller multiplies (``UNIT``). The lanes hold the columns in the order that
unpacking gives; activations are brought into the same order (``INTERLEAVE``).
"""

from __future__ import annotations

from typing import Any

from numba.core import types

from quantport.backend import once
from quantport_cpu.jit.elements import ELEMENTS, NUMBERS, element_of
from quantport_cpu.jit.gemv_bytes import LANES, PREFETCH_AHEAD, e4m3_to_fp16, output_addresses
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import words
from quantport_cpu.jit.simd import F16, F32, I8, I16, I32, I64, Simd, Value, cgutils, inline

TILE_ROWS = 2 if LANES == 16 else 1  # weight rows of a tile: its sums are vectors of 16
STEP = 32  # weights of one row in one step
OUTER = 512  # columns of an outer scale
FP32, BF16 = 0, -1  # in place of a number of rows: the weights are written as such
E8M0, E4M3, F32_SCALE, DUAL = 0, 1, 2, 3  # how scales are stored
# By bits of a code: lanes hold every second column, every fourth, or all of them in turn.
INTERLEAVE = {4: 2, 6: 4, 8: 1}
UNIT = {"e4m3fn": 2.0**8, "e3m2": 2.0**12, "e2m3": 2.0**14}
SCALE_UNIT = 2.0**8  # of e4m3fn scales


def decode_codes(simd: Simd, address: Value, table: Value, n_format: int) -> list[Value]:
    """32 codes as two vectors of fp32, over ``UNIT``."""
    element = element_of(n_format)
    if element.bits == 4:
        wide = simd.widen(simd.load(I8, 16, address), I32)
        return [simd.look_up(table, v) for v in (wide, simd.int_op("lshr", wide, 4))]
    if element.bits == 8:
        half = e4m3_to_fp16(simd, address)
    else:
        packed = simd.load(I8, 24, address)
        triples = [3 * (i // 4) + min(i % 4, 2) for i in range(32)]
        fours = simd.bitcast(simd.shuffle(packed, packed, triples), I32, 8)
        shifts = [simd.int_op("lshr", fours, 6 * i) if i else fours for i in range(4)]
        pairs = [simd.shuffle(shifts[i], shifts[i + 1], range(16)) for i in (0, 2)]
        codes = simd.narrow(simd.shuffle(pairs[0], pairs[1], range(32)), I16)
        magnitude = simd.int_op("shl", simd.int_op("and_", codes, 31), 10 - element.mantissa)
        sign = simd.int_op("shl", simd.int_op("and_", codes, 32), 10)
        half = simd.bitcast(simd.b.or_(magnitude, sign), F16)
    return [simd.half_to_float(simd.shuffle(half, half, range(i, i + 16))) for i in (0, 16)]


def _e8m0_value(simd: Simd, address: Value) -> Value:
    """fp32 value of an e8m0 code; 0, which is 2**-127, counts as zero."""
    return simd.b.bitcast(simd.b.shl(simd.b.zext(simd.load(I8, 0, address), I32), I32(23)), F32)


def lane_scales(simd: Simd, scale: Value, outer: Value, column: Value, n_kind: int, group: int) -> Value:
    """The scale of each lane, for the 32 weights at ``column``."""
    block = simd.b.udiv(column, I64(group))
    if n_kind == F32_SCALE:
        return simd.splat(simd.load(F32, 0, simd.at(scale, simd.b.mul(block, I64(4)))), 16)
    if n_kind == E4M3:
        wide = simd.widen(simd.load(I8, 2, simd.at(scale, block)), I16)
        pair = simd.half_to_float(simd.bitcast(simd.int_op("shl", wide, 7), F16))
        return simd.shuffle(pair, pair, [0] * 8 + [1] * 8)
    value = _e8m0_value(simd, simd.at(scale, block))
    if n_kind == DUAL:
        second = simd.b.mul(simd.b.udiv(column, I64(OUTER)), I64(4))
        value = simd.b.fmul(value, simd.load(F32, 0, simd.at(outer, second)))
    return simd.splat(value, 16)


def _codes_address(simd: Simd, w: Value, column: Value, n_format: int) -> Value:
    return simd.at(w, simd.b.lshr(simd.b.mul(column, I64(element_of(n_format).bits)), I64(3)))


@inline(types.void, 12, 13, 14, 15)
def tile(
    simd: Simd,
    x: Value,
    x_stride: Value,
    w: Value,
    w_stride: Value,
    k: Value,
    scale: Value,
    scale_stride: Value,
    outer: Value,
    outer_stride: Value,
    table: Value,
    out: Value,
    out_stride: Value,
    n_format: int,
    n_kind: int,
    n_group: int,
    n_m: int,
) -> None:
    """``TILE_ROWS`` weight rows times ``n_m`` rows of x. ``w_stride`` 0 repeats the row."""
    values = simd.load(F32, 16, table)
    sums = simd.variables(simd.splat(0.0, 16, F32), TILE_ROWS * n_m)
    rows = [simd.at(w, simd.b.mul(w_stride, I64(r))) for r in range(TILE_ROWS)]
    scales = [simd.at(scale, simd.b.mul(scale_stride, I64(r))) for r in range(TILE_ROWS)]
    outers = [simd.at(outer, simd.b.mul(outer_stride, I64(r))) for r in range(TILE_ROWS)]
    with cgutils.for_range_slice(simd.b, I64(0), k, I64(STEP), I64) as (column, _):
        for r in range(TILE_ROWS):
            here = _codes_address(simd, rows[r], column, n_format)
            simd.prefetch(simd.at(here, PREFETCH_AHEAD))
            factor = lane_scales(simd, scales[r], outers[r], column, n_kind, n_group)
            weights = [simd.b.fmul(v, factor) for v in decode_codes(simd, here, values, n_format)]
            for m in range(n_m):
                row = simd.at(simd.at(x, simd.b.mul(x_stride, I64(m))), simd.b.mul(column, I64(4)))
                for i in (0, 1):
                    total = sums[r * n_m + m]
                    xs = simd.load(F32, 16, simd.at(row, 64 * i))
                    simd.b.store(simd.intrinsic("fma", weights[i], xs, simd.b.load(total)), total)
    for r, m, address in output_addresses(simd, out, out_stride, w_stride, TILE_ROWS, n_m):
        simd.store(simd.reduce_lanes(simd.b.load(sums[r * n_m + m])), address)


@inline(types.void, 6, 7, 8, 9)
def decode_row(
    simd: Simd,
    w: Value,
    k: Value,
    scale: Value,
    outer: Value,
    table: Value,
    out: Value,
    n_format: int,
    n_kind: int,
    n_group: int,
    n_bytes: int,
) -> None:
    """One weight row, columns in order, in ``n_bytes``: 4 as fp32, 2 as bf16."""
    values = simd.load(F32, 16, table)
    turn = INTERLEAVE[element_of(n_format).bits]
    order = [i % turn * (STEP // turn) + i // turn for i in range(STEP)]
    with cgutils.for_range_slice(simd.b, I64(0), k, I64(STEP), I64) as (column, _):
        factor = lane_scales(simd, scale, outer, column, n_kind, n_group)
        here = _codes_address(simd, w, column, n_format)
        lanes = [simd.b.fmul(v, factor) for v in decode_codes(simd, here, values, n_format)]
        store = simd.store if n_bytes == 4 else simd.store_bf16
        store(simd.shuffle(lanes[0], lanes[1], order), simd.at(out, simd.b.mul(column, I64(n_bytes))))


def _body(n_format: int, n_kind: int, n_group: int, bits: int) -> Any:
    def rows(frame):
        x, x_stride, w, n, k = words(frame, 2, 5)
        scale, scale_stride, outer, outer_stride = words(frame, 7, 4)
        table, out, m, span, out_stride = words(frame, 11, 5)
        stride = k * bits >> 3
        while True:
            block = next_block(frame)
            if block >= block_count(frame):
                break
            for row in range(block * span, min(n, block * span + span), 1 if m <= 0 else TILE_ROWS):
                here, s, o = w + row * stride, scale + row * scale_stride, outer + row * outer_stride
                step = stride if row + 1 < n else 0
                s_step, o_step = (scale_stride, outer_stride) if row + 1 < n else (0, 0)
                y = out + 4 * row
                # fmt: off
                if m == FP32:
                    decode_row(here, k, s, o, table, out + 4 * k * row, n_format, n_kind, n_group, 4)
                elif m == BF16:
                    decode_row(here, k, s, o, table, out + 2 * k * row, n_format, n_kind, n_group, 2)
                elif m == 1:
                    tile(
                        x, x_stride, here, step, k, s, s_step, o, o_step, table, y, out_stride,
                        n_format, n_kind, n_group, 1,
                    )
                elif m == 2:
                    tile(
                        x, x_stride, here, step, k, s, s_step, o, o_step, table, y, out_stride,
                        n_format, n_kind, n_group, 2,
                    )
                else:
                    for i in range(0, m, 4):
                        tile(
                            x + i * x_stride, x_stride, here, step, k, s, s_step, o, o_step, table,
                            y + i * out_stride, out_stride, n_format, n_kind, n_group, 4,
                        )
                # fmt: on

    return rows


@once
def kernel(name: str, kind: int, group: int) -> Kernel:
    """The kernel of one format. A block is ``span`` weight rows.

    In place of rows of x it takes ``FP32`` or ``BF16``: then the weights themselves are written. Words: x,
    its stride, weights, n, k, scales, their stride, outer scales, their stride, table, out, rows of x, span,
    stride of out.
    """
    return Kernel(_body(NUMBERS[name], kind, group, ELEMENTS[name].bits))
