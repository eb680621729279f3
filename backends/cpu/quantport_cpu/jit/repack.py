"""int4 words of the checkpoint to ATen's packed layout: a transposition of nibbles, in registers."""

from __future__ import annotations

from numba import njit
from numba.core import types

from quantport_cpu.jit.emit import I8, I64, Simd, Value, inline
from quantport_cpu.jit.frame import Kernel, take, word

WIDTH = 16  # bytes of a row, and rows, of one tile


def _zip(lanes: int) -> tuple[list[int], list[int]]:
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
def tile(simd: Simd, low: Value, high: Value, stride: Value, to: Value, to_stride: Value) -> None:
    """16 rows of 16 bytes at ``low`` and at ``high`` to 32 columns of 16 bytes: nibbles of low rows, high
    rows above them.
    """
    rows = []
    for r in range(WIDTH):
        a, b = (simd.load(I8, WIDTH, simd.at(base, simd.b.mul(stride, I64(r)))) for base in (low, high))
        even = simd.b.or_(simd.integer("and_", a, 15), simd.integer("shl", b, 4))
        odd = simd.b.or_(simd.integer("lshr", a, 4), simd.integer("and_", b, -16))
        rows.append(simd.shuffle(even, odd, range(2 * WIDTH)))
    order = _zip(2 * WIDTH)
    for _ in range(4):  # each round interleaves row i with row i + 8: four of them transpose 16 x 16 bytes
        rows = [simd.shuffle(rows[i], rows[i + 8], half) for i in range(8) for half in order]
    for column, row in enumerate(rows):
        for parity in (0, 1):
            part = simd.shuffle(row, row, range(WIDTH * parity, WIDTH * (parity + 1)))
            simd.store(part, simd.at(to, simd.b.mul(to_stride, I64(2 * column + parity))))


@inline(types.void)
def move(simd: Simd, to: Value, source: Value, size: Value) -> None:
    """Copies bytes."""
    simd.copy(to, source, size)


@inline(types.void)
def wipe(simd: Simd, to: Value, size: Value) -> None:
    """Zeroes bytes, 16 at a time; ``size`` is a multiple of 16."""
    with simd.steps(size, 16) as i:
        simd.store(simd.splat(0, 16, I8), simd.at(to, i))


@njit(error_model="numpy")
def _edge(source, source_stride, n, row, column, width, half, bounce, out, low, size):
    """A tile that crosses the edge of the weight, through zeroed buffers; keeps ``size`` of its 32
    columns.
    """
    wipe(bounce, 2 * 16 * 16)
    for side in range(2):
        first = row + side * half + low
        for r in range(max(0, min(16, n - first))):
            start = source + (first + r) * source_stride + column
            move(bounce + 256 * side + 16 * r, start, max(0, min(16, width - column)))
    tile(bounce, bounce + 256, 16, bounce + 512, 16)
    for c in range(size):
        move(out + c * half, bounce + 512 + 16 * c, 16)


def _pack(frame):
    """A block is one block of channels. Words: see ``quantize.pack_int4``."""
    source, source_stride, n, width = word(frame, 2), word(frame, 3), word(frame, 4), word(frame, 5)
    to, k, half, buffers = word(frame, 6), word(frame, 7), word(frame, 8), word(frame, 9)
    while True:
        block = take(frame)
        if block >= word(frame, 1):
            break
        row, out, bounce = block * 2 * half, to + block * half * k, buffers + 1024 * block
        for column in range(0, k // 2, 16):
            whole = row + 2 * half <= n and column + 16 <= width and 2 * column + 32 <= k
            for low in range(0, half, 16):
                here = out + 2 * column * half + low
                if whole:
                    start = source + (row + low) * source_stride + column
                    tile(start, start + half * source_stride, source_stride, here, half)
                else:
                    size = min(32, k - 2 * column)
                    _edge(source, source_stride, n, row, column, width, half, bounce, here, low, size)


kernel = Kernel(_pack)
