"""Generates the attention of few query tokens over keys and values as a quantized KV cache stores them.

A row is the codes of one head of one token and, behind them, its scale in bf16. Every row is read once for
all query rows that share it, decoded in registers, and summed in fp32; the softmax is computed chunk by chunk
of the tokens, as in FlashAttention (Dao et al., arXiv:2205.14135). Where several blocks share the tokens of a
head, the one that ends last joins their sums, in the order of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir  # llvmlite has no types
from numba import literally, njit
from numba.core import types

from quantport.backend import once
from quantport_cpu.jit.elements import NUMBERS, element_of
from quantport_cpu.jit.gemv_bytes import fp8_factor, fp8_to_fp16
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import as_float, clear_by_16, store_uint32, words
from quantport_cpu.jit.simd import F32, I8, I32, I64, Simd, Value, cgutils, inline
from quantport_cpu.jit.softmax import LOWEST, STATE_BYTES, join, softmax

LANES = 16  # elements that are decoded at a time; heads are a multiple of it
CHUNK = 128  # tokens whose scores are kept: their keys and values stay in the first cache
SCALE_BYTES = 2
LINE = 64  # bytes of a line of memory
PREFETCH_AHEAD = 2048  # bytes of keys


def row_bytes(element: str, width: int) -> int:
    """Bytes of a row of the cache of ``width`` elements."""
    return width * bits(element) // 8 + SCALE_BYTES


def bits(element: str) -> int:
    """Bits of a code."""
    return element_of(NUMBERS[element]).bits


def work_bytes(rows: int, value_width: int, tile: int) -> int:
    """Bytes that a block works in: outputs and states of its rows, and scores and scales of a chunk."""
    return (4 * value_width + STATE_BYTES) * rows + 4 * CHUNK * (tile + 2)


def _decode(simd: Simd, address: Value, number: int) -> Value:
    """16 codes of a row as fp32."""
    element = element_of(number)
    if element.exponent:
        return simd.half_to_float(fp8_to_fp16(simd, simd.load(I8, LANES, address), element.exponent))
    if element.bits == 4:
        pairs = simd.load(I8, LANES // 2, address)
        low, high = simd.int_op("and_", pairs, 15), simd.int_op("lshr", pairs, 4)
        codes = simd.shuffle(low, high, [i // 2 + i % 2 * (LANES // 2) for i in range(LANES)])
        return simd.int_to_float(simd.widen(simd.int_op("sub", codes, 8), I32, signed=True))
    return simd.int_to_float(simd.widen(simd.load(I8, LANES, address), I32, signed=True))


def _dots(simd: Simd, sums: Sequence[Value]) -> Value:
    """The sum of the lanes of each of 1 to 16 vectors, a power of two of them, in their order."""
    groups, vectors = [[i] for i in range(len(sums))], list(sums)
    size = LANES  # lanes that are parts of one sum
    while size > 1:
        half = size // 2
        if len(vectors) == 1:
            starts = range(0, vectors[0].type.count, size)
            parts = [[s + i for s in starts for i in range(at, at + half)] for at in (0, half)]
            vectors = [simd.b.fadd(*(simd.shuffle(vectors[0], vectors[0], part) for part in parts))]
        else:
            a_b = list(zip(vectors[::2], vectors[1::2], strict=True))
            starts = range(0, 2 * LANES, size)
            count = len(starts) // 2
            # within registers of 128 bits, groups of both lie side by side
            order = [g for i in range(count) for g in (i, count + i)] if half < 4 else list(range(2 * count))
            parts = [[starts[g] + i for g in order for i in range(at, at + half)] for at in (0, half)]
            vectors = [simd.b.fadd(*(simd.shuffle(a, b, part) for part in parts)) for a, b in a_b]
            pairs = [x + y for x, y in zip(groups[::2], groups[1::2], strict=True)]
            groups = [[both[g] for g in order] for both in pairs]
        size = half
    return simd.shuffle(vectors[0], vectors[0], [groups[0].index(i) for i in range(len(sums))])


@inline(types.void, 4, 5, 6, 7)
def score(
    simd: Simd,
    q: Value,
    keys: Value,
    values: Value,
    out: Value,
    n_rows: int,
    width: int,
    value_width: int,
    number: int,
    count: Value,
    length: Value,
) -> None:
    """Products of ``n_rows`` rows of q and ``count`` keys as stored, without scales: ``out[row][token]``.

    Values of the same tokens, and keys further on, are fetched meanwhile. ``length`` is ``width``: a number
    that LLVM does not know, and so cannot unroll until sums no longer fit in registers.
    """
    element = element_of(number)
    row, value_row = row_bytes(element.name, width), row_bytes(element.name, value_width)
    bits = element.bits

    def tile(first: Value, n_tokens: int) -> None:
        sums = simd.variables(simd.splat(0.0, LANES, F32), n_tokens * n_rows)
        here = simd.at(keys, simd.b.mul(first, I64(row)))
        for offset in range(0, n_tokens * row, LINE):
            simd.prefetch(simd.at(here, PREFETCH_AHEAD + offset))
        value = simd.at(values, simd.b.mul(first, I64(value_row)))
        for offset in range(0, n_tokens * value_row, LINE):
            simd.prefetch(simd.at(value, offset))
        with simd.steps(length, LANES) as i:
            place = simd.at(here, simd.b.lshr(simd.b.mul(i, I64(bits)), I64(3)))
            at = simd.at(q, simd.b.shl(i, I64(2)))
            xs = [simd.load(F32, LANES, simd.at(at, 4 * width * r)) for r in range(n_rows)]
            for t in range(n_tokens):
                code = _decode(simd, simd.at(place, t * row), number)
                for r, x in enumerate(xs):
                    into = sums[r * n_tokens + t]
                    simd.b.store(simd.intrinsic("fma", code, x, simd.b.load(into)), into)
        dots = _dots(simd, [simd.b.load(v) for v in sums])
        for r in range(n_rows):
            to = simd.at(simd.at(out, 4 * CHUNK * r), simd.b.shl(first, I64(2)))
            simd.store(simd.shuffle(dots, dots, range(r * n_tokens, (r + 1) * n_tokens)), to)

    n_tokens = simd.target.accumulators // n_rows
    with simd.steps(count, n_tokens) as first:
        tile(first, n_tokens)
    if n_tokens > 1:
        rest = simd.b.and_(count, I64(-n_tokens))
        with cgutils.for_range_slice(simd.b, rest, count, I64(1), I64) as (first, _):
            tile(first, 1)


@inline(types.void, 4, 5, 6)
def add_values(
    simd: Simd,
    weights: Value,
    values: Value,
    factors: Value,
    out: Value,
    n_rows: int,
    width: int,
    number: int,
    count: Value,
) -> None:
    """``out[row] = out[row] * factors[row] + sum of weights[row][token] * values[token]`` as stored."""
    row, bits = row_bytes(element_of(number).name, width), element_of(number).bits

    def tile(start: Value, n_vectors: int) -> None:
        sums = simd.variables(simd.splat(0.0, LANES, F32), n_rows * n_vectors)
        here = simd.at(out, simd.b.shl(start, I64(2)))
        outs = [simd.at(here, 4 * (width * r + LANES * v)) for r in range(n_rows) for v in range(n_vectors)]
        for i, (address, total) in enumerate(zip(outs, sums, strict=True)):
            factor = simd.splat(simd.load(F32, 0, simd.at(factors, STATE_BYTES * (i // n_vectors))), LANES)
            simd.b.store(simd.b.fmul(simd.load(F32, LANES, address), factor), total)
        first = simd.at(values, simd.b.lshr(simd.b.mul(start, I64(bits)), I64(3)))
        with simd.steps(count, 1) as token:
            place = simd.at(first, simd.b.mul(token, I64(row)))
            at = simd.at(weights, simd.b.shl(token, I64(2)))
            shares = [simd.splat(simd.load(F32, 0, simd.at(at, 4 * CHUNK * r)), LANES) for r in range(n_rows)]
            for v in range(n_vectors):
                code = _decode(simd, simd.at(place, v * LANES * bits // 8), number)
                for r, weight in enumerate(shares):
                    into = sums[r * n_vectors + v]
                    simd.b.store(simd.intrinsic("fma", code, weight, simd.b.load(into)), into)
        for address, total in zip(outs, sums, strict=True):
            simd.store(simd.b.load(total), address)

    n_vectors = min(4, simd.target.accumulators // n_rows)
    whole = width // (n_vectors * LANES) * n_vectors * LANES
    for start, stop, step in ((0, whole, n_vectors), (whole, width, 1)):
        if start < stop:
            with cgutils.for_range_slice(simd.b, I64(start), I64(stop), I64(step * LANES), I64) as (at, _):
                tile(at, step)


@inline(types.int64, 0, 1)
def row_of(simd: Simd, width: int, number: int) -> Value:
    """Bytes of a row."""
    return I64(row_bytes(element_of(number).name, width))


@inline(types.void, 3, 4)
def load_scales(simd: Simd, rows: Value, out: Value, count: Value, width: int, number: int) -> None:
    """The scales of ``count`` rows, as fp32."""
    element = element_of(number)
    stride = row_bytes(element.name, width)
    with simd.steps(count, 1) as token:
        at = simd.at(simd.at(rows, simd.b.mul(token, I64(stride))), stride - SCALE_BYTES)
        scale = simd.b.fmul(simd.load_bf16(1, at), simd.splat(fp8_factor(element.exponent), 1, F32))
        simd.store(scale, simd.at(out, simd.b.shl(token, I64(2))))


@inline(types.int64)
def arrive(simd: Simd, counter: Value) -> Value:
    """How many blocks arrived at a counter before; what they wrote can then be read."""
    pointer = simd.b.inttoptr(counter, ir.PointerType(I64))
    return simd.b.atomic_rmw("add", pointer, I64(1), "acq_rel")


@njit(error_model="numpy")
def _add_tokens(
    q, rows, width, k, v, mask, mask_row, mask_step, scale, tokens, out, n_rows, k_width, v_width, number
):
    """Sums of ``tokens`` tokens for all query rows of a head; ``out`` is where the block works."""
    n_rows, k_width, v_width = literally(n_rows), literally(k_width), literally(v_width)
    number = literally(number)
    padded = (rows + n_rows - 1) // n_rows * n_rows
    states = out + 4 * padded * v_width
    scores = states + STATE_BYTES * padded
    scales = scores + 4 * CHUNK * n_rows
    clear_by_16(out, 4 * padded * v_width + STATE_BYTES * padded)
    for r in range(padded):
        store_uint32(states + STATE_BYTES * r, 0, LOWEST)
    for t in range(0, tokens, CHUNK):
        count = min(CHUNK, tokens - t)
        k_here, v_here = k + t * row_of(k_width, number), v + t * row_of(v_width, number)
        for first in range(0, padded, n_rows):
            score(
                q + 4 * k_width * first,
                k_here,
                v_here,
                scores,
                n_rows,
                k_width,
                v_width,
                number,
                count,
                width,
            )
            if first == 0:
                load_scales(k_here, scales, count, k_width, number)
                load_scales(v_here, scales + 4 * CHUNK, count, v_width, number)
            for r in range(n_rows):
                added = mask + t * mask_step + min(first + r, rows - 1) * mask_row
                state = states + STATE_BYTES * (first + r)
                softmax(scores + 4 * CHUNK * r, scales, scales + 4 * CHUNK, scale, added, count, state)
            state = states + STATE_BYTES * first
            add_values(scores, v_here, state + 8, out + 4 * v_width * first, n_rows, v_width, number, count)


def _body(n_rows: int, k_width: int, v_width: int, number: int) -> Any:
    def attend(frame):
        (line,) = words(frame, 2, 1)
        q, k, v, mask, out, work, counters = words(line, 0, 7)
        heads, rows, tokens, span, splits, scale = words(line, 7, 6)
        k_batch, k_head, v_batch, v_head = words(line, 13, 4)
        mask_batch, mask_head, mask_row, mask_step, work_stride, width = words(line, 17, 6)
        padded = (rows + n_rows - 1) // n_rows * n_rows
        while True:
            block = next_block(frame)
            if block >= block_count(frame):
                break
            pair, part = block // splits, block % splits
            batch, head, first = pair // heads, pair % heads, part * span
            _add_tokens(
                q + 4 * k_width * padded * pair,
                rows,
                width,
                k + batch * k_batch + head * k_head + first * row_of(k_width, number),
                v + batch * v_batch + head * v_head + first * row_of(v_width, number),
                mask + batch * mask_batch + head * mask_head + first * mask_step,
                mask_row,
                mask_step,
                as_float(scale),
                min(span, tokens - first),
                work + block * work_stride,
                n_rows,
                k_width,
                v_width,
                number,
            )
            if arrive(counters + 8 * pair) == splits - 1:
                parts = work + pair * splits * work_stride
                for r in range(rows):
                    states = parts + 4 * padded * v_width + STATE_BYTES * r
                    to = out + 4 * v_width * (pair * rows + r)
                    join(parts + 4 * v_width * r, states, work_stride, splits, to, v_width)

    return attend


@once
def kernel(element: str, key_width: int, value_width: int, tile: int) -> Kernel:
    """The attention over rows of a format, for heads of these widths, multiples of 16; ``tile`` query rows
    share a decoded key or value: 1, 2 or 4.

    A block is a part of the tokens of one head. Its word is the address of a line: see ``kv_cache.attend``.
    """
    return Kernel(_body(tile, key_width, value_width, NUMBERS[element]))
