"""The experts of one token in one launch: gate and up, activation, down, and the weighted sum.

Blocks of gate and up come first. A thread that finds none left waits until all are finished, and goes on with
those of down. Roundings are those of torch's operators over bf16, one by one: an activation function is a
table of its results for every bf16, made by torch.
"""

from __future__ import annotations

from typing import Any

from numba import njit
from numba.core import types

from quantport.backend import once
from quantport_cpu.jit import gemm_int4, gemm_int8, gemv_bytes, int4_rows
from quantport_cpu.jit.encode import quantize_int8_row
from quantport_cpu.jit.few_rows import SPAN, round_results, scale_results, widen_row
from quantport_cpu.jit.int_digits import split_row
from quantport_cpu.jit.parallel_for import (
    Kernel,
    block_count,
    finish_block,
    next_block,
    take_slot,
    wait_for_blocks,
)
from quantport_cpu.jit.scalars import as_float, clear_by_16, copy_bytes, store_uint32, words
from quantport_cpu.jit.simd import F32, I16, I32, I64, Simd, Value, inline

MULTIPLE = 64  # columns of activations are padded with zeros to a multiple of it
RESULTS = 3 * 4 * SPAN  # bytes of a slot for the results of a block: of two weights, and their sums
_int8_tile, _int4_tile, _bytes_tile = gemm_int8.tile, gemm_int4.tile, gemv_bytes.tile
_prepare_row, _arrange_row, _group_sums = gemm_int8.prepare_row, int4_rows.arrange_row, int4_rows.group_sums


def slot_bytes(columns: int, rows: int, row_bytes: int) -> int:
    """Bytes of a slot, with ``rows`` rows of activations of up to so many columns, ``row_bytes`` each in the
    form that a kernel multiplies, and what making them takes.
    """
    return RESULTS + rows * (MULTIPLE + row_bytes) + 7 * -(-columns // MULTIPLE) * MULTIPLE


@inline(types.void)
def gate(simd: Simd, values: Value, up: Value, table: Value, to: Value, count: Value) -> None:
    """Stores ``activation(values) * up`` for ``count`` fp32 results, each rounded to bf16, as bf16."""

    def rounded(address: Value) -> Value:
        return simd.bf16_bits(simd.load(F32, 1, address))

    def float_of(bits: Value) -> Value:
        return simd.bitcast(simd.int_op("shl", bits, 16), F32)

    with simd.steps(count, 1) as i:
        place = simd.b.shl(i, I64(2))
        bits = simd.b.extract_element(rounded(simd.at(values, place)), I32(0))
        entry = simd.at(table, simd.b.shl(simd.b.zext(bits, I64), I64(1)))
        active = simd.widen(simd.load(I16, 1, entry), I32)
        product = simd.b.fmul(float_of(active), float_of(rounded(simd.at(up, place))))
        simd.store(simd.narrow(simd.bf16_bits(product), I16), simd.at(to, simd.b.shl(i, I64(1))))


@inline(types.void)
def add_weighted(simd: Simd, values: Value, factor: Value, sums: Value) -> None:
    """Adds ``SPAN`` fp32 results times the bf16 at ``factor`` to ``sums``; results and products are rounded
    to bf16.
    """

    def rounded(value: Value) -> Value:
        return simd.bitcast(simd.int_op("shl", simd.bf16_bits(value), 16), F32)

    scale = simd.splat_bf16(factor, 8)
    for i in range(0, 4 * SPAN, 32):
        product = simd.b.fmul(rounded(simd.load(F32, 8, simd.at(values, i))), scale)
        total = simd.b.fadd(simd.load(F32, 8, simd.at(sums, i)), rounded(product))
        simd.store(total, simd.at(sums, i))


@njit(error_model="numpy")
def store_sums(sums, out, first, last):
    """Stores the columns ``first`` to ``last - 1`` of the result."""
    round_results(sums)
    copy_bytes(out + 2 * first, sums, 2 * (last - first))


@njit(error_model="numpy")
def _int8_rows(source, k, to, stride, count, half_range, n_bytes):
    """Quantizes rows of bf16; before each are its scale and its sum."""
    columns, codes = (k + MULTIPLE - 1) // MULTIPLE * MULTIPLE, to + count * stride
    for i in range(count):
        row = to + i * stride
        quantize_int8_row(source + 2 * i * k, k, codes, row, 0, half_range)
        if n_bytes == 1:
            store_uint32(row, 1, _prepare_row(codes, row + MULTIPLE, k, columns, 1))
        else:
            store_uint32(row, 1, _prepare_row(codes, row + MULTIPLE, k, columns, 2))


@njit(error_model="numpy")
def _int8_span(x, w, k, scales, step, first, last, to, n_rows):
    """Rows ``first`` to ``last - 1`` of a weight times a row of ``_int8_rows``."""
    for row in range(first, last, n_rows):
        here, scale, y = w + row * k, scales + row * step, to + 4 * (row - first)
        _int8_tile(x + MULTIPLE, 0, x, x + 4, here, min(n_rows, last - row), k, scale, step, y, 0, 1)


def _int8_body(n_rows: int, n_bytes: int) -> Any:
    def experts(frame):
        chosen, top_k, factors, x, hidden, wide, table, between, out = words(frame, 2, 9)
        gate_up, up_scales, up_each, down, down_scales, down_each = words(frame, 11, 6)
        step, stride, half_range = words(frame, 17, 3)
        half_range, slot = as_float(half_range), take_slot(frame)
        rows, sums = slot + RESULTS, slot + 8 * SPAN
        _int8_rows(x, hidden, rows, stride, 1, half_range, n_bytes)
        spans, block = (wide + SPAN - 1) // SPAN, next_block(frame)
        while block < spans * top_k:
            job, first = block // spans, block % spans * SPAN
            last, (expert,) = min(wide, first + SPAN), words(chosen + 8 * job, 0, 1)
            for i in range(2):
                w, c = gate_up + (2 * expert + i) * wide * hidden, up_scales + (2 * expert + i) * up_each
                _int8_span(rows, w, hidden, c, step, first, last, slot + 4 * SPAN * i, n_rows)
            gate(slot, slot + 4 * SPAN, table, between + 2 * (job * wide + first), last - first)
            finish_block(frame)
            block = next_block(frame)
        wait_for_blocks(frame, spans * top_k)
        _int8_rows(between, wide, rows, stride, top_k, half_range, n_bytes)
        while block < block_count(frame):
            first = (block - spans * top_k) * SPAN
            last = min(hidden, first + SPAN)
            clear_by_16(sums, 4 * SPAN)
            for i in range(top_k):
                (expert,) = words(chosen + 8 * i, 0, 1)
                w, c = down + expert * hidden * wide, down_scales + expert * down_each
                _int8_span(rows + i * stride, w, wide, c, step, first, last, slot, n_rows)
                add_weighted(slot, factors + 2 * i, sums)
            store_sums(sums, out, first, last)
            block = next_block(frame)

    return experts


@once
def int8_kernel() -> Kernel:
    """int8 weights and activations. A block is ``SPAN`` rows of gate and up of an expert; then of all down.

    Words of each kernel here: numbers of the experts, how many, their factors in bf16, the token in bf16,
    hidden, intermediate, table of the activation function, memory for what goes into down, out. Of this one
    then: gate and up of all experts, scales of their channels, bytes of those of a weight; down, likewise;
    bytes from one scale to the next, bytes of a row of activations in a slot, bits of the half range.
    """
    return Kernel(_int8_body(gemm_int8.weight_rows(), gemm_int8.activation_bytes()))


@njit(error_model="numpy")
def _bytes_rows(source, k, to, stride, count):
    """Widens rows of bf16 to fp32."""
    for i in range(count):
        widen_row(source + 2 * i * k, to + i * stride, k, (k + MULTIPLE - 1) // MULTIPLE * MULTIPLE)


@njit(error_model="numpy")
def _bytes_span(x, w, k, n, blocks, channels, step, first, last, to, is_blocks, n_format):
    """Rows ``first`` to ``last - 1`` of a weight of ``n`` times a row of fp32."""
    if is_blocks:
        blocks, scale_step, chunk = blocks + (first >> 7) * 4 * ((k + 127) >> 7), 4, 128
    else:
        scale_step, chunk = 0, k
    for row in range(first, last, 2):
        here, y, stride = w + row * k, to + 4 * (row - first), k if row + 1 < n else 0
        if n_format == 0:
            _bytes_tile(x, 0, here, stride, k, chunk, blocks, scale_step, 0, y, 4 * SPAN, 0, 1)
        else:
            _bytes_tile(x, 0, here, stride, k, chunk, blocks, scale_step, 0, y, 4 * SPAN, 1, 1)
    scale_results(to, channels + first * step, step, last - first)


def _bytes_body(n_format: int) -> Any:
    def experts(frame):
        chosen, top_k, factors, x, hidden, wide, table, between, out = words(frame, 2, 9)
        gate_up, up_blocks, up_rows, up_scales, up_each = words(frame, 11, 5)
        down, down_blocks, down_rows, down_scales, down_each = words(frame, 16, 5)
        step, stride = words(frame, 21, 2)
        slot = take_slot(frame)
        rows, sums = slot + RESULTS, slot + 8 * SPAN
        _bytes_rows(x, hidden, rows, stride, 1)
        spans, block = (wide + SPAN - 1) // SPAN, next_block(frame)
        while block < spans * top_k:
            job, first = block // spans, block % spans * SPAN
            last, (expert,) = min(wide, first + SPAN), words(chosen + 8 * job, 0, 1)
            for i in range(2):
                number, to = 2 * expert + i, slot + 4 * SPAN * i
                w, s, c = gate_up + number * wide * hidden, number * up_rows, up_scales + number * up_each
                _bytes_span(rows, w, hidden, wide, up_blocks + s, c, step, first, last, to, up_rows, n_format)
            gate(slot, slot + 4 * SPAN, table, between + 2 * (job * wide + first), last - first)
            finish_block(frame)
            block = next_block(frame)
        wait_for_blocks(frame, spans * top_k)
        _bytes_rows(between, wide, rows, stride, top_k)
        while block < block_count(frame):
            first = (block - spans * top_k) * SPAN
            last = min(hidden, first + SPAN)
            clear_by_16(sums, 4 * SPAN)
            for i in range(top_k):
                (expert,) = words(chosen + 8 * i, 0, 1)
                w, s, c = down + expert * hidden * wide, expert * down_rows, down_scales + expert * down_each
                at, to = rows + i * stride, slot
                _bytes_span(
                    at, w, wide, hidden, down_blocks + s, c, step, first, last, to, down_rows, n_format
                )
                add_weighted(slot, factors + 2 * i, sums)
            store_sums(sums, out, first, last)
            block = next_block(frame)

    return experts


@once
def bytes_kernel(n_format: int) -> Kernel:
    """Weights of a byte in a format of ``gemv_bytes``, as ``int8_kernel``.

    Words of this one: gate and up of all experts, scales of 128x128 blocks, bytes of those of a weight, or a
    single one and 0, scales of channels, bytes of those of a weight; down, likewise; bytes from one scale of
    a channel to the next, bytes of a row of activations in a slot.
    """
    return Kernel(_bytes_body(n_format))


@njit(error_model="numpy", inline="always")
def _int4_rows(source, k, to, stride, count, half_range, sums_at, group, digits):
    """Brings rows of bf16 into spans; before each is its scale."""
    work, columns = to + count * stride, (k + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    for i in range(count):
        row, here = to + i * stride, source + 2 * i * k
        if digits == 1:
            quantize_int8_row(here, k, work, row, 0, half_range)
        else:
            widen_row(here, work + 3 * columns, k, columns)
            split_row(work + 3 * columns, work, columns, row, 0)
        _arrange_row(work, columns, k, row + MULTIPLE, group, digits)
        if sums_at:
            _group_sums(work, columns, k, row + MULTIPLE + sums_at, group, digits)


@njit(error_model="numpy", inline="always")
def _int4_span(x, w, k, scales, zeros, number, n, first, last, to, group, n_zero, factor, digits, n_rows):
    """Rows ``first`` to ``last - 1`` of a weight of ``n`` times a row of ``_int4_rows``."""
    stride, groups = (k + 7) // 8 * 4, (k + group - 1) // group
    scale_stride = groups * (4 if factor == 0 else 2)
    for row in range(first, last, n_rows):
        place, y, c = number * n + row, to + 4 * (row - first), min(n_rows, last - row)
        here, s, z = w + place * stride, scales + place * scale_stride, zeros + place * scale_stride
        at = x + MULTIPLE
        # fmt: off
        _int4_tile(at, 0, x, here, stride, c, k, s, scale_stride, z, groups, y, 0,
                   group, n_zero, digits, factor, 1)
        # fmt: on


def _int4_body(group: int, n_zero: int, factor: int, digits: int, n_rows: int) -> Any:
    def experts(frame):
        chosen, top_k, factors, x, hidden, wide, table, between, out = words(frame, 2, 9)
        gate_up, up_scales, up_zeros, up_sums, down, down_scales, down_zeros, down_sums = words(frame, 11, 8)
        stride, half_range = words(frame, 19, 2)
        half_range, slot = as_float(half_range), take_slot(frame)
        rows, sums = slot + RESULTS, slot + 8 * SPAN
        _int4_rows(x, hidden, rows, stride, 1, half_range, up_sums, group, digits)
        spans, block = (wide + SPAN - 1) // SPAN, next_block(frame)
        while block < spans * top_k:
            job, first = block // spans, block % spans * SPAN
            last, (expert,) = min(wide, first + SPAN), words(chosen + 8 * job, 0, 1)
            # fmt: off
            for i in range(2):
                _int4_span(rows, gate_up, hidden, up_scales, up_zeros, 2 * expert + i, wide, first, last,
                           slot + 4 * SPAN * i, group, n_zero, factor, digits, n_rows)
            # fmt: on
            gate(slot, slot + 4 * SPAN, table, between + 2 * (job * wide + first), last - first)
            finish_block(frame)
            block = next_block(frame)
        wait_for_blocks(frame, spans * top_k)
        _int4_rows(between, wide, rows, stride, top_k, half_range, down_sums, group, digits)
        while block < block_count(frame):
            first = (block - spans * top_k) * SPAN
            last = min(hidden, first + SPAN)
            clear_by_16(sums, 4 * SPAN)
            for i in range(top_k):
                (expert,) = words(chosen + 8 * i, 0, 1)
                # fmt: off
                _int4_span(rows + i * stride, down, wide, down_scales, down_zeros, expert, hidden, first,
                           last, slot, group, n_zero, factor, digits, n_rows)
                # fmt: on
                add_weighted(slot, factors + 2 * i, sums)
            store_sums(sums, out, first, last)
            block = next_block(frame)

    return experts


@once
def int4_kernel(group: int, has_zero: bool, factor: int, digits: int) -> Kernel:
    """int4 weights in groups, as ``int8_kernel``; activations are int8, or integers of some digits.

    Words of this one: gate and up of all experts, their scales, their offsets or 0, where in a row of
    activations the sums of its groups begin or 0; down, likewise; bytes of a row of activations in a slot,
    bits of the half range.
    """
    return Kernel(_int4_body(group, int(has_zero), factor, digits, gemm_int4.weight_rows()))
