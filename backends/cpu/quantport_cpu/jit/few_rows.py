"""What kernels share that read a few bf16 rows as they are, and round their results themselves: one launch.

The scratch of a thread, its slot, begins with the results of a block.
"""

from __future__ import annotations

from numba import njit
from numba.core import types

from quantport_cpu.jit.scalars import copy_bytes
from quantport_cpu.jit.simd import F32, I64, Simd, Value, cgutils, inline

SPAN = 32  # weight rows of a block; it divides the 128 rows of a block of scales
MOST_ELEMENTS = 1 << 15  # of rows that every thread reads for itself; with more, another launch is faster


def is_read_by_each_thread(rows: int, columns: int) -> bool:
    """Whether every thread reads, and quantizes, all rows for itself."""
    return rows == 1 or rows * columns <= MOST_ELEMENTS


@inline(types.void)
def widen_row(simd: Simd, source: Value, to: Value, k: Value, columns: Value) -> None:
    """Writes ``k`` bf16 as fp32, and zeros up to ``columns``; both go by 16."""
    with simd.steps(k, 16) as i:
        row = simd.load_bf16(16, simd.at(source, simd.b.shl(i, I64(1))))
        simd.store(row, simd.at(to, simd.b.shl(i, I64(2))))
    done, bounce = simd.b.and_(k, I64(-16)), simd.buffer(32)
    zero = simd.splat(0.0, 16, F32)
    with cgutils.for_range_slice(simd.b, done, columns, I64(16), I64) as (i, _):
        simd.store(zero, simd.at(to, simd.b.shl(i, I64(2))))
    with simd.remainder(k, 16) as (start, size):
        simd.copy(bounce, simd.at(source, simd.b.shl(start, I64(1))), simd.b.shl(size, I64(1)))
        simd.store(simd.load_bf16(16, bounce), simd.at(to, simd.b.shl(start, I64(2))))


@inline(types.void)
def scale_results(simd: Simd, values: Value, scales: Value, step: Value, count: Value) -> None:
    """Multiplies ``count`` fp32 by scales that are ``step`` bytes apart."""
    with simd.steps(count, 1) as i:
        address = simd.at(values, simd.b.shl(i, I64(2)))
        scale = simd.load(F32, 0, simd.at(scales, simd.b.mul(step, i)))
        simd.store(simd.b.fmul(simd.load(F32, 0, address), scale), address)


@inline(types.void)
def round_results(simd: Simd, values: Value) -> None:
    """Rounds ``SPAN`` fp32 to bf16 where they lie."""
    for i in range(0, SPAN, 16):
        simd.store_bf16(simd.load(F32, 16, simd.at(values, 4 * i)), simd.at(values, 2 * i))


@njit(error_model="numpy")
def store_results(values, rows, out, place, width, count, is_bf16):
    """Stores ``count`` results of each of some rows, which lie ``SPAN`` fp32 apart, at element ``place`` of a
    result of ``width`` columns.
    """
    for m in range(rows):
        here, to = values + 4 * SPAN * m, place + m * width
        if is_bf16:
            round_results(here)
            copy_bytes(out + 2 * to, here, 2 * count)
        else:
            copy_bytes(out + 4 * to, here, 4 * count)
