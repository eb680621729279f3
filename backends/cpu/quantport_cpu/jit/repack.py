"""Repacks the int4 words of a checkpoint into ATen's layout, by transposing nibbles in registers."""

from __future__ import annotations

from numba import njit
from numba.core import types

from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import clear_by_16, copy_bytes, words
from quantport_cpu.jit.simd import I8, I64, Simd, Value, inline

TILE = 16  # rows of one tile, and bytes of each


def _interleave(lanes: int) -> tuple[list[int], list[int]]:
    """x86's byte unpacking of two vectors: the low and the high halves of each 16 bytes, interleaved."""
    low, high = (
        [
            i + side
            for base in range(0, lanes, 16)
            for i in range(base + start, base + start + 8)
            for side in (0, lanes)
        ]
        for start in (0, 8)
    )
    return low, high


@inline(types.void)
def transpose_tile(simd: Simd, low: Value, high: Value, stride: Value, to: Value, to_stride: Value) -> None:
    """Transposes 16 rows of 16 bytes at ``low``, and as many at ``high``, to 32 columns of 16 bytes.

    A byte of a column holds the nibble of a low row and, above it, that of the high row.
    """
    rows = []
    for r in range(TILE):
        a, b = (simd.load(I8, TILE, simd.at(base, simd.b.mul(stride, I64(r)))) for base in (low, high))
        even = simd.b.or_(simd.int_op("and_", a, 15), simd.int_op("shl", b, 4))
        odd = simd.b.or_(simd.int_op("lshr", a, 4), simd.int_op("and_", b, -16))
        rows.append(simd.shuffle(even, odd, range(2 * TILE)))
    order = _interleave(2 * TILE)
    for _ in range(4):  # rounds that interleave row i with row i + 8: four of them transpose 16 x 16 bytes
        rows = [simd.shuffle(rows[i], rows[i + 8], half) for i in range(8) for half in order]
    for column, row in enumerate(rows):
        for parity in (0, 1):
            part = simd.shuffle(row, row, range(TILE * parity, TILE * (parity + 1)))
            simd.store(part, simd.at(to, simd.b.mul(to_stride, I64(2 * column + parity))))


@njit(error_model="numpy")
def _edge_tile(source, source_stride, n, row, column, width, half, bounce, out, low, size):
    """Transposes a tile that crosses the edge of the weight, and keeps ``size`` of its 32 columns.

    Its rows are copied to ``bounce``, which holds zeros beyond the edge.
    """
    clear_by_16(bounce, 2 * 16 * 16)
    for side in range(2):
        first = row + side * half + low
        for r in range(max(0, min(16, n - first))):
            start = source + (first + r) * source_stride + column
            copy_bytes(bounce + 256 * side + 16 * r, start, max(0, min(16, width - column)))
    transpose_tile(bounce, bounce + 256, 16, bounce + 512, 16)
    for c in range(size):
        copy_bytes(out + c * half, bounce + 512 + 16 * c, 16)


def _pack(frame):
    """A block is one block of channels. Words: see ``quantize.pack_int4``."""
    source, source_stride, n, width = words(frame, 2, 4)
    to, k, half, buffers = words(frame, 6, 4)
    while True:
        block = next_block(frame)
        if block >= block_count(frame):
            break
        row, out, bounce = block * 2 * half, to + block * half * k, buffers + 1024 * block
        for column in range(0, k // 2, 16):
            is_inside = row + 2 * half <= n and column + 16 <= width and 2 * column + 32 <= k
            for low in range(0, half, 16):
                here = out + 2 * column * half + low
                if is_inside:
                    start = source + (row + low) * source_stride + column
                    transpose_tile(start, start + half * source_stride, source_stride, here, half)
                else:
                    size = min(32, k - 2 * column)
                    _edge_tile(source, source_stride, n, row, column, width, half, bounce, here, low, size)


kernel = Kernel(_pack)
