"""Generates exact products of int8 activations with int8 weights by AMX tiles, for many rows.

A tile is 16 rows of 64 bytes. One of weights is 16 output channels as they are stored; one of activations is
16 tokens, four columns of each side by side; their product is int32 ``[16 channels, 16 tokens]``.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, ``TDPBSSD`` and ``LDTILECFG``.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache

from llvmlite import ir
from numba.core import types

from quantport_cpu.jit.encode import quantize_int8_row
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import as_float, load_uint32, store_uint32, words
from quantport_cpu.jit.simd import F32, I8, I16, I32, I64, Simd, Value, cgutils, inline
from quantport_cpu.jit.target import host_target

FEATURES = ("amx-tile", "amx-int8", "avx512f")
ROWS = 16  # of a tile
STEP = 64  # columns of a tile
TILE_BYTES = ROWS * STEP
CHANNELS = 2 * ROWS  # that a thread takes at a time
MAX_COLUMNS = 1 << 16  # 128 * 128 * this is below 2**31
JOB_BYTES = 48  # six words
_WEIGHTS, _ACTIVATIONS = 4, 6  # numbers of the first tile of each; sums are in 0 to 3
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux ``Documentation/arch/x86/xstate.rst``


@cache
def is_usable() -> bool:
    """Whether the processor has int8 tiles, and the system lets this process use them."""
    if platform.system() != "Linux" or not host_target().has(*FEATURES):
        return False
    refused: int = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
    return not refused


def _instruction(simd: Simd, name: str, *operands: Value) -> None:
    simd.call(f"llvm.x86.{name}", ir.VoidType(), *operands)


def _pointer(simd: Simd, address: Value) -> Value:
    return simd.b.inttoptr(address, ir.PointerType(I8))


@inline(types.void)
def configure(simd: Simd) -> None:
    """Gives every tile its full size."""
    config = simd.buffer(64)
    simd.store(I8(1), config)  # the palette
    simd.store(simd.splat(STEP, 8, I16), simd.at(config, 16))
    simd.store(simd.splat(ROWS, 8, I8), simd.at(config, 48))
    _instruction(simd, "ldtilecfg", _pointer(simd, config))


@inline(types.void)
def release(simd: Simd) -> None:
    """Gives the tiles back."""
    _instruction(simd, "tilerelease")


@inline(types.int64)
def tile_buffer(simd: Simd) -> Value:
    """Memory for four tiles."""
    return simd.buffer(4 * TILE_BYTES)


@inline(types.void, 4, 5)
def multiply(simd: Simd, x: Value, w: Value, k: Value, sums: Value, n_w: int, n_x: int) -> None:
    """Writes ``n_w`` times 16 weight rows by ``n_x`` times 16 tokens to ``sums``, tile by tile."""
    panel = simd.b.shl(k, I64(4))  # bytes of 16 tokens
    for i in range(n_w * n_x):
        _instruction(simd, "tilezero", I8(i))
    with cgutils.for_range_slice(simd.b, I64(0), k, I64(STEP), I64) as (column, _):
        for i in range(n_w):
            here = simd.at(w, simd.b.add(column, simd.b.mul(k, I64(ROWS * i))))
            _instruction(simd, "tileloadd64", I8(_WEIGHTS + i), _pointer(simd, here), k)
        for j in range(n_x):
            here = simd.at(x, simd.b.add(simd.b.shl(column, I64(4)), simd.b.mul(panel, I64(j))))
            _instruction(simd, "tileloadd64", I8(_ACTIVATIONS + j), _pointer(simd, here), I64(STEP))
        for i in range(n_w):
            for j in range(n_x):
                tiles = (I8(n_x * i + j), I8(_WEIGHTS + i), I8(_ACTIVATIONS + j))
                _instruction(simd, "tdpbssd", *tiles)
    for i in range(n_w * n_x):
        place = _pointer(simd, simd.at(sums, TILE_BYTES * i))
        _instruction(simd, "tilestored64", I8(i), place, I64(STEP))


@inline(types.void)
def write_tile(
    simd: Simd,
    sums: Value,
    token: Value,
    count: Value,
    channel: Value,
    channel_step: Value,
    out: Value,
    out_stride: Value,
) -> None:
    """Writes 16 channels of ``count`` tokens, up to 16, with the scales of both; ``sums`` is overwritten."""
    tokens, scaled = simd.load(F32, ROWS, token), []
    for r in range(ROWS):
        value = simd.int_to_float(simd.load(I32, ROWS, simd.at(sums, STEP * r)))
        scale = simd.load(F32, 0, simd.at(channel, simd.b.mul(channel_step, I64(r))))
        scaled.append(simd.b.fmul(simd.b.fmul(value, tokens), simd.splat(scale, ROWS)))
    for r, row in enumerate(simd.transposed(scaled)):
        simd.store(row, simd.at(sums, STEP * r))
    with cgutils.for_range_slice(simd.b, I64(0), count, I64(1), I64) as (r, _):
        row = simd.load(F32, ROWS, simd.at(sums, simd.b.shl(r, I64(6))))
        simd.store(row, simd.at(out, simd.b.mul(r, out_stride)))


def _multiply(frame):
    """A block is 32 weight rows of one job, or 16 at the end. Words: jobs, blocks of a job, n, k, bytes from
    one scale of a channel to the next, stride of out. Words of a job: tiles and scales as ``prepare_kernel``
    writes them, weights, scales of channels, out, rows of x.
    """
    table, blocks_per_job, n, k, channel_step, out_stride = words(frame, 2, 6)
    sums = tile_buffer()
    configure()
    while True:
        block = next_block(frame)
        if block >= block_count(frame):
            break
        x, token, w, channel, out, m = words(table + JOB_BYTES * (block // blocks_per_job), 0, 6)
        row = block % blocks_per_job * CHANNELS
        here, n_w = w + row * k, min(2, (n - row) // ROWS)
        for i in range(0, m, 2 * ROWS):
            at, n_x = x + i * k, 2 if m - i > ROWS else 1
            if n_w == 2 and n_x == 2:
                multiply(at, here, k, sums, 2, 2)
            elif n_w == 2:
                multiply(at, here, k, sums, 2, 1)
            elif n_x == 2:
                multiply(at, here, k, sums, 1, 2)
            else:
                multiply(at, here, k, sums, 1, 1)
            for tile in range(n_w * n_x):
                r, t = row + ROWS * (tile // n_x), i + ROWS * (tile % n_x)
                to, scale = out + 4 * r + t * out_stride, channel + r * channel_step
                tokens = min(ROWS, m - t)
                write_tile(
                    sums + TILE_BYTES * tile, token + 4 * t, tokens, scale, channel_step, to, out_stride
                )
    release()


kernel = Kernel(_multiply)


@inline(types.void)
def interleave_rows(simd: Simd, codes: Value, count: Value, k: Value, to: Value) -> None:
    """Writes ``count`` rows of codes, up to 16, as tiles; the last one in place of missing ones."""
    rows = [simd.at(codes, simd.b.mul(k, i)) for i in simd.rows_there(count, ROWS)]
    with cgutils.for_range_slice(simd.b, I64(0), k, I64(STEP), I64) as (column, _):
        values = [simd.load(I32, ROWS, simd.at(row, column)) for row in rows]
        tile = simd.at(to, simd.b.shl(column, I64(4)))
        for r, value in enumerate(simd.transposed(values)):
            simd.store(value, simd.at(tile, STEP * r))


def _prepare(frame):
    """A block is up to 16 rows of one job. Words: the first row and the number of rows of each block, codes
    (written where there is a source), k, tiles, scales in the order of the tiles, bf16 or 0, its stride,
    scales of the rows, bits of the half range.
    """
    table, codes, k, to, scales = words(frame, 2, 5)
    source, source_stride, row_scales, half_range = words(frame, 7, 4)
    while True:
        block = next_block(frame)
        if block >= block_count(frame):
            break
        first, count = words(table + 16 * block, 0, 2)
        for row in range(first, first + count):
            if source != 0:
                here = source + row * source_stride
                quantize_int8_row(here, k, codes + row * k, row_scales, row, as_float(half_range))
            store_uint32(scales, ROWS * block + row - first, load_uint32(row_scales, row))
        interleave_rows(codes + first * k, count, k, to + block * ROWS * k)


prepare_kernel = Kernel(_prepare)
