"""Multiplies small groups of rows, each by weights of its own, in one launch.

A job is one weight with some rows: a line of a table. A block is a span of output channels of
one job, so threads share the work of all jobs evenly, whatever the number of rows of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantport.backend import BackendError, numerics
from quantport_cpu.jit import gemm_int8, gemv_bytes
from quantport_cpu.jit.gemv_bytes import STEP
from quantport_cpu.jit.jobs import PER_TOKEN, Job
from quantport_cpu.jit.memory import Array, array, array_of_rows, table
from quantport_cpu.jit.parallel_for import threads_for
from quantport_cpu.jit.quantize_rows import fp32_bits, scratch_bytes
from quantport_cpu.jit.small_batch import empty_fp32, padded_fp32, scales_of_128_blocks

_SPAN = 32  # weight rows that a thread takes at a time; it divides the 128 rows of a block of scales
HALF_RANGE = fp32_bits(PER_TOKEN.element.half_range)


def fp8(
    x: Tensor, jobs: Sequence[Job], codes: Sequence[Tensor], scales: Sequence[Tensor] | None, width: int
) -> Tensor:
    """e4m3fn weights, decoded exactly.

    Args:
        x: ``[M, K]``, any floating dtype.
        jobs: Which rows meet which weight.
        codes: uint8 ``[N, K]``, contiguous.
        scales: fp32 ``[ceil(N/128), ceil(K/128)]`` of each weight, or None for scales that the caller
            multiplies.
        width: Columns of the result.

    Returns:
        fp32 ``[M, width]``.
    """
    return _bytes(gemv_bytes.E4M3, x, jobs, codes, scales, width)


def int8(x: Tensor, jobs: Sequence[Job], codes: Sequence[Tensor], width: int) -> Tensor:
    """int8 weights ``[N, K]``, as ``fp8`` without scales."""
    return _bytes(gemv_bytes.INT8, x, jobs, codes, None, width)


def _bytes(
    n_format: int,
    x: Tensor,
    jobs: Sequence[Job],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    width: int,
) -> Tensor:
    (m, _), (n, k), dtype = x.shape, codes[0].shape, (torch.uint8, torch.int8)[n_format]
    columns = -(-k // STEP) * STEP
    values, out = array(padded_fp32(x, m, columns), torch.float32, m, columns), empty_fp32(x, m, width)
    to, stride = array(out, torch.float32, m, width), 4 * columns
    _, step, scale_stride, chunk = scales_of_128_blocks(scales[0] if scales else None, n, k)
    lines = table(
        (
            values.at(stride * a, stride * (b - a)),
            array(codes[w], dtype, n, k),
            scales_of_128_blocks(scales[w] if scales else None, n, k)[0],
            output_part(to, width, a, b, c, n),
            b - a,
        )
        for a, b, w, c in jobs
    )
    blocks = -(-n // gemv_bytes.SPAN)
    gemv_bytes.kernel(n_format)(
        blocks * len(jobs),
        lines,
        blocks,
        stride,
        n,
        k,
        step,
        scale_stride,
        chunk,
        4 * width,
        threads=threads_for(n * k * len(jobs)),
    )
    return out


class Int8Rows(NamedTuple):
    """Activations as ``gemm_int8.kernel`` reads them.

    Attributes:
        values: Their codes ``[M, columns]``, padded with zeros to a multiple of 64.
        scales: fp32 ``[M]``.
        sums: Of the codes of each row, int32 ``[M]``.
        columns: Columns with the padding.
    """

    values: Array
    scales: Array
    sums: Array
    columns: int


def quantized_int8(x: Tensor) -> Int8Rows:
    """Activations ``[M, K]``, any floating dtype, with a scale for each row: of bf16 in one launch."""
    if x.dtype is torch.bfloat16 and x.stride(1) == 1:
        return _int8_rows(x, None, torch.empty(x.shape[0], dtype=torch.float32, device=x.device))
    q, token = numerics.quantize(x, PER_TOKEN)
    return prepared_int8(q, token)


def prepared_int8(q: Tensor, token: Tensor) -> Int8Rows:
    """Activations that are quantized: int8 ``[M, K]`` and fp32 ``[M, 1]``, contiguous."""
    return _int8_rows(q, q, token.view(-1))


def _int8_rows(x: Tensor, q: Tensor | None, scales: Tensor) -> Int8Rows:
    (m, k), size = x.shape, gemm_int8.activation_bytes()
    columns = -(-k // STEP) * STEP
    values, sums = scratch_bytes(x, m * columns * size), scratch_bytes(x, 4 * m)
    tokens = array(scales, torch.float32, m)
    source: tuple[Array | int, int] = (0, 0)
    if q is not None:
        codes, stride = array(q, torch.int8, m, k), k
    else:
        codes, stride = values if size == 1 else scratch_bytes(x, m * columns), columns
        source = (array_of_rows(x, torch.bfloat16, m, k), 2 * x.stride(0))
    gemm_int8.prepare_kernel()(
        m, codes, stride, k, values, columns, sums, *source, tokens, HALF_RANGE, threads=threads_for(m * k)
    )
    return Int8Rows(values, tokens, sums, columns)


def int8_int8(
    x: Int8Rows, jobs: Sequence[Job], codes: Sequence[Tensor], channels: Sequence[Tensor], width: int
) -> Tensor:
    """int8 activations times int8 weights, any number of rows: exact sums, times both scales in fp32.

    Args:
        x: ``[M, K]``.
        jobs: Which rows meet which weight.
        codes: int8 ``[N, K]``, contiguous.
        channels: fp32 ``[N, 1]`` of each weight, or ``[1, 1]`` for one scale of all; contiguous.
        width: Columns of the result.

    Returns:
        fp32 ``[M, width]``.
    """
    m, (n, k) = x.scales.size // 4, codes[0].shape
    stride, scales, out = (
        gemm_int8.activation_bytes() * x.columns,
        len(channels[0]),
        empty_fp32(codes[0], m, width),
    )
    to = array(out, torch.float32, m, width)
    lines = table(
        (
            x.values.at(stride * a, stride * (b - a)),
            x.scales.at(4 * a, 4 * (b - a)),
            x.sums.at(4 * a, 4 * (b - a)),
            array(codes[w], torch.int8, n, k),
            array(channels[w], torch.float32, scales, 1),
            output_part(to, width, a, b, c, n),
            b - a,
        )
        for a, b, w, c in jobs
    )
    blocks = -(-n // _SPAN)
    gemm_int8.kernel()(
        blocks * len(jobs),
        lines,
        blocks,
        stride,
        n,
        k,
        4 if scales > 1 else 0,
        4 * width,
        _SPAN,
        threads=threads_for(n * k * len(jobs)),
    )
    return out


def int8_row(x: Tensor, codes: Tensor, channel: Tensor) -> Tensor:
    """One row of bf16 as int8 times an int8 weight, in one launch: as ``int8_int8``, rounded to bf16.

    Args:
        x: bf16 ``[1, K]``, contiguous.
        codes: int8 ``[N, K]``, contiguous.
        channel: fp32 ``[N, 1]``, or ``[1, 1]`` for one scale of all; contiguous.

    Returns:
        bf16 ``[1, N]``.
    """
    (n, k), scales = codes.shape, len(channel)
    threads, slot = threads_for(n * k), gemm_int8.slot_bytes(k)
    out, scratch = x.new_empty(1, n), codes.new_empty(threads * slot)
    gemm_int8.row_kernel()(
        -(-n // gemm_int8.SPAN),
        array(x, torch.bfloat16, 1, k),
        k,
        array(codes, torch.int8, n, k),
        n,
        array(channel, torch.float32, scales, 1),
        4 if scales > 1 else 0,
        array(out, torch.bfloat16, 1, n),
        array(scratch, torch.int8, threads * slot),
        slot,
        HALF_RANGE,
        0,
        threads=threads,
    )
    return out


def output_part(out: Array, width: int, start: int, stop: int, column: int, n: int) -> Array:
    """Where ``n`` columns of rows ``start`` to ``stop - 1`` begin, in an fp32 result of ``width`` columns."""
    if column < 0 or column + n > width:
        raise BackendError(
            "write products to a group",
            f"columns {column} to {column + n} of {width}",
            "columns of the result",
        )
    return out.at(4 * (start * width + column), 4 * ((stop - start - 1) * width + n))
