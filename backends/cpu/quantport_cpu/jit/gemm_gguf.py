"""Generates the products of activations in q8_0 or q8_k with weights in blocks of GGUF, as they are stored.

Of each block there are eight sums of products of codes, which are exact: the sum L is of the columns whose
number modulo 32 is 4 L to 4 L + 3, times the scales of their sub-blocks. What the offset of the codes takes
away is part of them. Each is rounded to fp32 and, times the product of the two scales of the blocks, added to
a sum of its own by a fused multiply-add, block after block; the offsets of sub-blocks (q4_k, q5_k) follow in
the same way. At the end the eight are added by halves. So the result is the same on every processor.

Layouts: ggml ``ggml-common.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import types

from quantport.backend import once
from quantport_cpu.jit.gemv_bytes import PREFETCH_AHEAD
from quantport_cpu.jit.gemv_gguf import BYTES, NUMBERS, Q4_0, Q5_K, Q6_K, Q8_0
from quantport_cpu.jit.gguf_rows import BLOCK_BYTES, NIBBLES, SCALE_AT, SIGNED, UNSIGNED, K
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import words
from quantport_cpu.jit.simd import F16, F32, I8, I16, I32, I64, Simd, Value, cgutils, inline
from quantport_cpu.jit.target import host_target

TYPES = ("q4_0", "q8_0", "q4_k", "q5_k", "q6_k")
LANES = 8
RUN = 32  # columns of a sub-block of q4_k and q5_k, of a block of q4_0 and q8_0

Step = Callable[[Value, Value], Value]
"""Sums of products, and the address of a block of activations -> the sums with some more."""


class _Block(NamedTuple):
    """A block of a weight row, multiplied by one or more rows of activations in the order of its parts.

    Attributes:
        steps: The steps, each of which decodes its codes when its turn comes.
        terms: After the last step, what is added up: scales, fp32 in every lane, each with what makes the
            eight sums that it multiplies from those of the steps and the address of a block of activations.
    """

    steps: Iterator[Step]
    terms: Callable[[], list[tuple[Value, Step]]]


def rows_kind(number: int) -> int:
    """The kind of activations, of ``gguf_rows``, that the kernel of a block type reads."""
    if number == Q8_0:
        return UNSIGNED if host_target().dot_bits else SIGNED
    return NIBBLES if number == Q4_0 else K


def _half(simd: Simd, address: Value) -> Value:
    """The fp16 at an address, as fp32 in every lane."""
    return simd.half_to_float(simd.splat(simd.load(F16, 0, address), LANES))


def _block(simd: Simd, block: Value, n_type: int) -> _Block:
    if n_type in (Q4_0, Q8_0):
        step = _step_of_32(simd, simd.at(block, 2), n_type)
        return _Block(iter([step]), lambda: [(_half(simd, block), lambda sums, _: sums)])
    return _block_q6_k(simd, block) if n_type == Q6_K else _block_with_offsets(simd, block, n_type)


def _step_of_32(simd: Simd, codes: Value, n_type: int) -> Step:
    """q4_0 and q8_0. Codes are unsigned, with 8 or 128 too much, or widened where no instruction adds four
    products of bytes and they could be too large for one that adds two.
    """
    if n_type == Q4_0:
        nibbles = simd.load(I8, RUN // 2, codes)
        low, high = simd.int_op("and_", nibbles, 15), simd.int_op("lshr", nibbles, 4)
        unsigned = simd.shuffle(low, high, range(RUN))
    elif simd.target.dot_bits:
        unsigned = simd.int_op("xor", simd.load(I8, RUN, codes), -128)
    else:
        pairs = simd.load(I16, RUN // 2, codes)
        even, odd = simd.int_op("ashr", simd.int_op("shl", pairs, 8), 8), simd.int_op("ashr", pairs, 8)

        def widened(_: Value, x: Value) -> Value:
            columns = (simd.load(I16, RUN // 2, simd.at(x, i)) for i in (0, RUN))
            return simd.b.add(*map(simd.dot_pairs, (even, odd), columns))

        return widened

    def step(_: Value, x: Value) -> Value:
        signed, correction = simd.load(I8, RUN, x), simd.load(I32, LANES, simd.at(x, RUN))
        if simd.target.dot_bits:
            u, s = (simd.bitcast(v, I32, LANES) for v in (unsigned, signed))
            return simd.dot_quads(correction, u, s)
        pairs = simd.dot_byte_pairs(unsigned, signed)
        return simd.b.add(correction, simd.dot_pairs(pairs, simd.splat(1, 2 * LANES, I16)))

    return step


def _steps_of_256(simd: Simd, scales: Value, each: int, codes: Callable[[int], Value]) -> Iterator[Step]:
    """The steps of a K type, a run of 32 columns each.

    Args:
        simd: The builder.
        scales: 16 bytes, signed where ``each`` is 2.
        each: How many of them are those of a run: one, or one of each half.
        codes: The codes of a run, unsigned and up to 63: 2 * 63 * 127 fits in int16.
    """
    for first in (0, 4):  # the scales of four runs, so that one instruction spreads those of each
        order = [(first + run) * each + half * (each - 1) for half in (0, 1) for run in range(4)]
        pairs = simd.shuffle(scales, scales, [i for i in order for _ in (0, 1)])
        wide = simd.in_order(simd.bitcast(simd.widen(pairs, I16, signed=each == 2), I32, LANES))
        for run in range(4):
            spread = simd.shuffle(wide, wide, [run] * 4 + [run + 4] * 4)
            yield _step_of_run(simd, codes(first + run), simd.bitcast(spread, I16, 2 * LANES), first + run)


def _step_of_run(simd: Simd, codes: Value, factors: Value, run: int) -> Step:
    def step(total: Value, x: Value) -> Value:
        pairs = simd.dot_byte_pairs(codes, simd.load(I8, RUN, simd.at(x, RUN * run)))
        return simd.in_order(simd.b.add(total, simd.dot_pairs(pairs, factors)))

    return step


def _part(simd: Simd, address: Value, shift: int, mask: int) -> Value:
    """``mask`` of 32 bytes that are shifted right, or left where that is negative."""
    value = simd.load(I8, RUN, address)
    if shift:
        value = simd.int_op("shl" if shift < 0 else "lshr", value, abs(shift))
    return simd.int_op("and_", value, mask)


def _sums_of_16(simd: Simd, x: Value) -> Value:
    return simd.load(I16, 16, simd.at(x, 256))


def _sub_scales(simd: Simd, block: Value) -> Value:
    """q4_k and q5_k: the eight 6-bit scales of the sub-blocks, then their eight offsets, as 16 bytes."""
    packed = simd.load(I32, 4, simd.at(block, 4))  # the fourth word is of codes
    low = simd.int_op("and_", packed, 0x3F3F3F3F)
    top = simd.int_op("and_", simd.int_op("lshr", packed, 2), 0x30303030)
    rest = simd.shuffle(packed, packed, (2, 2, 2, 2))
    rest = simd.b.lshr(rest, ir.Constant(rest.type, [0, 4, 0, 4]))
    high = simd.b.or_(top, simd.int_op("and_", rest, 0x0F0F0F0F))
    return simd.bitcast(simd.in_order(simd.shuffle(low, high, (0, 4, 1, 5))), I8, 16)


def _block_with_offsets(simd: Simd, block: Value, n_type: int) -> _Block:
    both = _sub_scales(simd, block)

    def codes(run: int) -> Value:
        nibbles = simd.at(block, (48 if n_type == Q5_K else 16) + RUN * (run // 2))
        low = _part(simd, nibbles, 4 * (run % 2), 15)
        return simd.b.or_(low, _part(simd, simd.at(block, 16), run - 4, 16)) if n_type == Q5_K else low

    def terms() -> list[tuple[Value, Step]]:
        offsets = simd.widen(simd.shuffle(both, both, [8 + i // 2 for i in range(16)]), I16)
        least = simd.b.fneg(_half(simd, simd.at(block, 2)))
        return [
            (_half(simd, block), lambda sums, _: sums),
            (least, lambda _, x: simd.dot_pairs(offsets, _sums_of_16(simd, x))),
        ]

    return _Block(_steps_of_256(simd, both, 1, codes), terms)


def _block_q6_k(simd: Simd, block: Value) -> _Block:
    """Codes are stored plus 32."""
    scales = simd.load(I8, 16, simd.at(block, 192))

    def codes(run: int) -> Value:
        half, part = divmod(run, 4)
        low = _part(simd, simd.at(block, 64 * half + RUN * (part % 2)), 4 * (part // 2), 15)
        return simd.b.or_(low, _part(simd, simd.at(block, 128 + RUN * half), 2 * part - 4, 48))

    def terms() -> list[tuple[Value, Step]]:
        offset = simd.int_op("mul", simd.widen(scales, I16, signed=True), -32)

        def all_of(sums: Value, x: Value) -> Value:
            return simd.b.add(sums, simd.dot_pairs(offset, _sums_of_16(simd, x)))

        return [(_half(simd, simd.at(block, 208)), all_of)]

    return _Block(_steps_of_256(simd, scales, 2, codes), terms)


@once
def tile_rows() -> int:
    """Weight rows of a tile: its sums must fit in 32 registers, or in 16."""
    return 2 if host_target().pair_bits == 512 else 1


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
    """``count`` weight rows, up to ``tile_rows()``, times ``n_m`` rows of x.

    In place of rows that are not there the last one is multiplied again.
    """
    kind = rows_kind(n_type)
    index, size = simd.rows_there(count, tile_rows()), simd.b.mul(blocks, I64(BYTES[n_type]))
    rows = [simd.at(w, simd.b.mul(size, i)) for i in index]
    results = [simd.variables(simd.splat(0.0, LANES, F32), n_m) for _ in rows]
    with cgutils.for_range_slice(simd.b, I64(0), blocks, I64(1), I64) as (b, _):
        addresses = [simd.at(row, simd.b.mul(b, I64(BYTES[n_type]))) for row in rows]
        for address in addresses:
            for at in range(0, BYTES[n_type], 64):
                simd.prefetch(simd.at(address, PREFETCH_AHEAD + at))
        column = simd.at(x, simd.b.mul(b, I64(BLOCK_BYTES[kind])))
        xs = [simd.at(column, simd.b.mul(x_stride, I64(m))) for m in range(n_m)]
        here = [_block(simd, address, n_type) for address in addresses]
        sums = [[simd.splat(0, LANES, I32)] * n_m for _ in here]
        for steps in zip(*(block.steps for block in here), strict=True):
            sums = [
                [step(total, row) for total, row in zip(totals, xs, strict=True)]
                for step, totals in zip(steps, sums, strict=True)
            ]
        for block, totals, result in zip(here, sums, results, strict=True):
            for scale, add in block.terms():
                for total, row, variable in zip(totals, xs, result, strict=True):
                    token = simd.splat(simd.load(F32, 0, simd.at(row, SCALE_AT[kind])), LANES)
                    value = simd.int_to_float(add(total, row))
                    value = simd.intrinsic("fma", simd.b.fmul(scale, token), value, simd.b.load(variable))
                    simd.b.store(value, variable)
    for i, result in zip(index, results, strict=True):
        for m, total in enumerate(result):
            address = simd.fp32_address(out, out_stride, I64(m), i)
            simd.store(simd.reduce_lanes(simd.b.load(total)), address)


def _body(n_type: int, size: int, n_rows: int) -> Any:
    def rows(frame):
        x, x_stride, w, n, blocks = words(frame, 2, 5)
        out, out_stride, m, span = words(frame, 7, 4)
        while True:
            block = next_block(frame)
            if block >= block_count(frame):
                break
            first, i = block * span, 0
            last = min(n, first + span)
            # fmt: off
            while i < m:  # the activations of a tile stay in the first cache, the weights in the second
                at, y = x + i * x_stride, out + i * out_stride
                for row in range(first, last, n_rows):
                    here, count, to = w + row * blocks * size, last - row, y + 4 * row
                    if m - i >= 4:
                        tile(at, x_stride, here, count, blocks, to, out_stride, n_type, 4)
                    elif m - i >= 2:
                        tile(at, x_stride, here, count, blocks, to, out_stride, n_type, 2)
                    else:
                        tile(at, x_stride, here, count, blocks, to, out_stride, n_type, 1)
                i += 4 if m - i >= 4 else 2 if m - i >= 2 else 1
            # fmt: on

    return rows


@once
def kernel(name: str) -> Kernel:
    """The kernel of one of ``TYPES``, for any number of rows. A block of the loop is ``span`` weight rows.

    Words: activations as ``gguf_rows`` writes them, their stride, weights, n, blocks of a row, out, its
    stride, rows of x, span.
    """
    number = NUMBERS[name]
    return Kernel(_body(number, BYTES[number], tile_rows()))
