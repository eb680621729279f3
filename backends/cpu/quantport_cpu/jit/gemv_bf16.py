"""Generates the products of a small batch with bf16 weights as they are stored, in fp32."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from numba.core import types
from torch import Tensor

from quantport.backend import once
from quantport_cpu.jit.gemv_bytes import PREFETCH_AHEAD
from quantport_cpu.jit.memory import array
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block, threads_for
from quantport_cpu.jit.scalars import words
from quantport_cpu.jit.simd import F32, I64, Simd, Value, inline
from quantport_cpu.jit.small_batch import empty_fp32, padded_fp32
from quantport_cpu.jit.target import host_target

TILE_M = 4
PADDING = 64  # activations are padded with zeros to a multiple of it
CHUNK = 1024  # columns at a time, so that the activations of a tile stay in the first cache
SPAN = 36  # weight rows that a thread takes at a time; a multiple of ``tile_rows()``


@cache
def lanes() -> int:
    """fp32 numbers of a register: 4 on Arm."""
    return (host_target().pair_bits or 128) // 32


@cache
def tile_rows() -> int:
    """Weight rows of a tile: its sums and weights fit in 16 registers of 256 bits, or in 32 of others."""
    return 3 if lanes() == 8 else 4


@inline(types.void, 9)
def tile(
    simd: Simd,
    x: Value,
    x_stride: Value,
    w: Value,
    w_stride: Value,
    count: Value,
    k: Value,
    out: Value,
    out_stride: Value,
    begin: Value,
    n_m: int,
) -> None:
    """``count`` weight rows, up to ``tile_rows()``, times ``n_m`` rows of x, over ``k`` columns from
    ``begin`` on; products of columns before are in ``out``.

    In place of rows that are not there the last one is multiplied again.
    """
    index, size = simd.rows_there(count, tile_rows()), lanes()
    rows = [simd.at(simd.at(w, simd.b.mul(w_stride, i)), simd.b.shl(begin, I64(1))) for i in index]
    xs = [simd.at(simd.at(x, simd.b.mul(x_stride, I64(m))), simd.b.shl(begin, I64(2))) for m in range(n_m)]
    is_first = simd.b.icmp_signed("==", begin, I64(0))
    parts = 2 if n_m == 1 else 1  # sums that do not wait for each other
    sums = [[simd.variables(simd.splat(0.0, size, F32), parts) for _ in xs] for _ in rows]

    def step(column: Value, addresses: list[Value], part: int) -> None:
        weights = [simd.load_bf16(size, address) for address in addresses]
        for m, row in enumerate(xs):
            value = simd.load(F32, size, simd.at(row, simd.b.shl(column, I64(2))))
            for weight, totals in zip(weights, sums, strict=True):
                total = totals[m][part]
                simd.b.store(simd.intrinsic("fma", weight, value, simd.b.load(total)), total)

    width = size * parts
    with simd.steps(k, width) as i:
        here = [simd.at(row, simd.b.shl(i, I64(1))) for row in rows]
        for address in here:
            for line in range(0, max(1, 2 * width), 64):
                simd.prefetch(simd.at(address, PREFETCH_AHEAD + line))
        for part in range(parts):
            first = size * part
            step(simd.at(i, first), [simd.at(address, 2 * first) for address in here], part)
    with simd.remainder(k, width) as (start, left):
        bounces = [simd.buffer(2 * width) for _ in rows]
        for row, bounce in zip(rows, bounces, strict=True):
            simd.copy(bounce, simd.at(row, simd.b.shl(start, I64(1))), simd.b.shl(left, I64(1)))
        for part in range(parts):
            first = size * part
            step(simd.at(start, first), [simd.at(bounce, 2 * first) for bounce in bounces], part)
    outputs = []  # all of them before the first is stored: a row that stands in for others comes twice
    for i, by_row in zip(index, sums, strict=True):
        for m, totals in enumerate(by_row):
            value = simd.reduce_lanes(simd.sum([simd.b.load(total) for total in totals]))
            address = simd.fp32_address(out, out_stride, I64(m), i)
            before = simd.b.select(is_first, F32(0.0), simd.load(F32, 0, address))
            outputs.append((simd.b.fadd(before, value), address))
    for value, address in outputs:
        simd.store(value, address)


def _body(n_rows: int) -> Any:
    def rows(frame):
        x, x_stride, w, w_stride, n = words(frame, 2, 5)
        k, out, out_stride, m = words(frame, 7, 4)
        chunk = k if m <= TILE_M else CHUNK
        while True:
            block = next_block(frame)
            if block >= block_count(frame):
                break
            first, end = block * SPAN, min(n, block * SPAN + SPAN)
            for begin in range(0, k, chunk):
                length, i = min(chunk, k - begin), 0
                while i < m:
                    step = TILE_M if m - i >= TILE_M else 2 if m - i >= 2 else 1
                    at = x + i * x_stride
                    for row in range(first, end, n_rows):
                        here, to, count = (
                            w + row * w_stride,
                            out + i * out_stride + 4 * row,
                            min(n_rows, end - row),
                        )
                        # fmt: off
                        if step == TILE_M:
                            tile(at, x_stride, here, w_stride, count, length, to, out_stride, begin, TILE_M)
                        elif step == 2:
                            tile(at, x_stride, here, w_stride, count, length, to, out_stride, begin, 2)
                        else:
                            tile(at, x_stride, here, w_stride, count, length, to, out_stride, begin, 1)
                        # fmt: on
                    i += step

    return rows


@once
def kernel() -> Kernel:
    """The kernel. A block is ``SPAN`` weight rows.

    Words: x fp32, its stride, weights, their stride, n, k, out, its stride, rows of x.
    """
    return Kernel(_body(tile_rows()))


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in fp32.

    Args:
        x: ``[M, K]``, M from 1, any floating dtype.
        weight: bf16 ``[N, K]``, contiguous.

    Returns:
        fp32 ``[M, N]``.
    """
    (m, k), n = x.shape, weight.shape[0]
    columns = -(-k // PADDING) * PADDING
    values, out = padded_fp32(x, m, columns), empty_fp32(x, m, n)
    kernel()(
        -(-n // SPAN),
        array(values, torch.float32, m, columns),
        4 * columns,
        array(weight, torch.bfloat16, n, k),
        2 * k,
        n,
        k,
        array(out, torch.float32, m, n),
        4 * n,
        m,
        threads=threads_for(n * k),
    )
    return out
