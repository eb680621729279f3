"""Multiplies small groups of rows, each by weights of its own, in one launch.

A job is one weight with some rows: a line of a table. A block is a span of output channels of
one job, so threads share the work of all jobs evenly, whatever the number of rows of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantport.backend import numerics
from quantport_cpu.jit import gemm_int8, gemv_bytes
from quantport_cpu.jit.few_rows import SPAN, is_read_by_each_thread
from quantport_cpu.jit.gemv_bytes import STEP
from quantport_cpu.jit.jobs import PER_TOKEN, Job, all_rows, table
from quantport_cpu.jit.memory import Array, array, array_of_rows
from quantport_cpu.jit.parallel_for import threads_for
from quantport_cpu.jit.quantize_rows import fp32_bits, scratch_bytes
from quantport_cpu.jit.row_call import RowCall
from quantport_cpu.jit.small_batch import ONE, padded_fp32, scales_of_128_blocks

HALF_RANGE = fp32_bits(PER_TOKEN.element.half_range)


class Scales(NamedTuple):
    """Scales of the weights that ``fp8`` and ``int8`` multiply.

    Attributes:
        channels: fp32 ``[..., N, 1]``, or ``[..., 1, 1]`` for one of a weight; None where there are none.
        blocks: fp32 ``[..., ceil(N/128), ceil(K/128)]``, or None.
        groups: fp32 ``[..., N, ceil(K/group)]``, in place of ``blocks``, or None.
        group: Columns that share one of ``groups``: a multiple of 64.
    """

    channels: Tensor | None = None
    blocks: Tensor | None = None
    groups: Tensor | None = None
    group: int = 0


def fp8(
    x: Tensor,
    jobs: Sequence[Job],
    codes: Tensor,
    scales: Scales,
    width: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """e4m3fn weights, decoded exactly.

    Args:
        x: ``[M, K]``, any floating dtype.
        jobs: Which rows meet which weight.
        codes: uint8 ``[..., N, K]``, contiguous: one weight, or several.
        scales: Of the weights, contiguous.
        width: Columns of the result.
        dtype: Of the result: fp32, or bf16, to which it is rounded.

    Returns:
        ``[M, width]``.
    """
    return _bytes(gemv_bytes.E4M3, x, jobs, codes, scales, width, dtype)


def int8(
    x: Tensor,
    jobs: Sequence[Job],
    codes: Tensor,
    scales: Scales,
    width: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """int8 weights, as ``fp8``."""
    return _bytes(gemv_bytes.INT8, x, jobs, codes, scales, width, dtype)


def _bytes(
    n_format: int,
    x: Tensor,
    jobs: Sequence[Job],
    codes: Tensor,
    scales: Scales,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    m, (*several, n, k), columns = x.shape[0], codes.shape, -(-codes.shape[-1] // STEP) * STEP
    weights, threads = math.prod(several), threads_for(n * k * len(jobs))
    values: Array | int = 0
    source: tuple[Array | int, int] = (0, 0)
    if x.dtype is torch.bfloat16 and x.stride(1) == 1 and is_read_by_each_thread(m, k):
        source = array_of_rows(x, torch.bfloat16, m, k), 2 * x.stride(0)
    else:
        values = array(padded_fp32(x, m, columns), torch.float32, m, columns)
    slot = gemv_bytes.slot_bytes(k, m if source[0] else 0)
    channels, each = _channels(scales, several)
    blocks, out = -(-n // SPAN), torch.empty(m, width, dtype=dtype, device=x.device)
    gemv_bytes.kernel(n_format)(
        blocks * len(jobs),
        table(jobs, m, weights, n, width),
        blocks,
        array(codes, (torch.uint8, torch.int8)[n_format], *several, n, k),
        n,
        k,
        *_blocks(scales, *several, n, k),
        channels,
        4 if each > 1 else 0,
        4 * each,
        values,
        4 * columns,
        array(out, dtype, m, width),
        width,
        dtype is torch.bfloat16,
        *source,
        m,
        threads=threads,
        slot=slot,
    )
    return out


class Int8Rows(NamedTuple):
    """Activations as ``gemm_int8.kernel`` reads them: in its own form, or a few rows of bf16.

    Attributes:
        values: Codes ``[M, columns]``, padded with zeros to a multiple of 64; 0 for bf16.
        scales: fp32 ``[M]``, or 0.
        sums: Of the codes of each row, int32 ``[M]``, or 0.
        source: bf16 ``[M, K]``, which each thread quantizes for itself, or 0.
        stride: Bytes from row to row of ``source``.
        rows: How many there are.
    """

    values: Array | int
    scales: Array | int
    sums: Array | int
    source: Array | int
    stride: int
    rows: int


def quantized_int8(x: Tensor) -> Int8Rows:
    """Activations ``[M, K]``, any floating dtype, with a scale for each row: of bf16 in one launch, or in the
    one that multiplies them.
    """
    if x.dtype is not torch.bfloat16 or x.stride(1) != 1:
        return prepared_int8(*numerics.quantize(x, PER_TOKEN))
    (m, k), stride = x.shape, 2 * x.stride(0)
    source = array_of_rows(x, torch.bfloat16, m, k)
    if is_read_by_each_thread(m, k):
        return Int8Rows(0, 0, 0, source, stride, m)
    return _int8_rows(x, None, torch.empty(m, dtype=torch.float32, device=x.device), (source, stride))


def prepared_int8(q: Tensor, token: Tensor) -> Int8Rows:
    """Activations that are quantized: int8 ``[M, K]`` and fp32 ``[M, 1]``, contiguous."""
    return _int8_rows(q, q, token.view(-1), (0, 0))


def _int8_rows(x: Tensor, q: Tensor | None, scales: Tensor, source: tuple[Array | int, int]) -> Int8Rows:
    (m, k), size = x.shape, gemm_int8.activation_bytes()
    columns = -(-k // STEP) * STEP
    values, sums = scratch_bytes(x, m * columns * size), scratch_bytes(x, 4 * m)
    tokens = array(scales, torch.float32, m)
    if q is not None:
        codes, stride = array(q, torch.int8, m, k), k
    else:
        codes, stride = values if size == 1 else scratch_bytes(x, m * columns), columns
    gemm_int8.prepare_kernel()(
        m, codes, stride, k, values, columns, sums, *source, tokens, HALF_RANGE, threads=threads_for(m * k)
    )
    return Int8Rows(values, tokens, sums, 0, 0, m)


def int8_int8(
    x: Int8Rows,
    jobs: Sequence[Job],
    codes: Tensor,
    channels: Tensor,
    width: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """int8 activations times int8 weights, any number of rows: exact sums, times both scales in fp32.

    Args:
        x: ``[M, K]``.
        jobs: Which rows meet which weight.
        codes: int8 ``[..., N, K]``, contiguous: one weight, or several.
        channels: fp32 ``[..., N, 1]``, or ``[..., 1, 1]`` for one scale of a weight; contiguous.
        width: Columns of the result.
        dtype: Of the result: fp32, or bf16, to which it is rounded.

    Returns:
        ``[M, width]``.
    """
    (*several, n, k), scales, m = codes.shape, channels.shape[-2], x.rows
    weights, is_bf16 = math.prod(several), dtype is torch.bfloat16
    threads, out = threads_for(n * k * len(jobs)), torch.empty(m, width, dtype=dtype, device=codes.device)
    slot = gemm_int8.slot_bytes(k, m if x.source else 0) if x.source or is_bf16 else 0
    blocks = -(-n // SPAN)
    gemm_int8.kernel()(
        blocks * len(jobs),
        table(jobs, m, weights, n, width),
        blocks,
        array(codes, torch.int8, *several, n, k),
        n,
        k,
        array(channels, torch.float32, *several, scales, 1),
        4 if scales > 1 else 0,
        4 * scales,
        x.values,
        -(-k // STEP) * STEP * gemm_int8.activation_bytes(),
        x.scales,
        x.sums,
        array(out, dtype, m, width),
        width,
        is_bf16,
        x.source,
        x.stride,
        m,
        HALF_RANGE,
        threads=threads,
        slot=slot,
    )
    return out


def int8_row(codes: Tensor, channel: Tensor) -> RowCall:
    """``int8_int8`` for single rows of bf16 and one weight.

    Args:
        codes: int8 ``[N, K]``, contiguous.
        channel: fp32 ``[N, 1]``, or ``[1, 1]`` for one scale of all; contiguous.
    """
    (n, k), scales = codes.shape, len(channel)
    before = (
        table(all_rows(1), 1, 1, n, n),
        -(-n // SPAN),
        array(codes, torch.int8, n, k),
        n,
        k,
        array(channel, torch.float32, scales, 1),
        4 if scales > 1 else 0,
        4 * scales,
        0,
        -(-k // STEP) * STEP * gemm_int8.activation_bytes(),
        0,
        0,
    )
    kernel, slot = gemm_int8.kernel(), gemm_int8.slot_bytes(k, 1)
    return RowCall(kernel, (codes, channel), before, (2 * k, 1, HALF_RANGE), (n, k), -(-n // SPAN), slot)


def bytes_row(n_format: int, codes: Tensor, scales: Scales) -> RowCall:
    """``fp8`` or ``int8`` for single rows of bf16 and one weight."""
    n, k = codes.shape
    channels, each = _channels(scales, ())
    before = (
        table(all_rows(1), 1, 1, n, n),
        -(-n // SPAN),
        array(codes, (torch.uint8, torch.int8)[n_format], n, k),
        n,
        k,
        *_blocks(scales, n, k),
        channels,
        4 if each > 1 else 0,
        4 * each,
        0,
        4 * -(-k // STEP) * STEP,
    )
    kernel, slot = gemv_bytes.kernel(n_format), gemv_bytes.slot_bytes(k, 1)
    held = [codes, *(t for t in (scales.channels, scales.blocks, scales.groups) if t is not None)]
    return RowCall(kernel, held, before, (2 * k, 1), (n, k), -(-n // SPAN), slot)


def _blocks(scales: Scales, *shape: int) -> tuple[Array, int, int, int, int]:
    """As ``scales_of_128_blocks``, of groups too; and the rows that share a scale."""
    if scales.groups is None:
        return *scales_of_128_blocks(scales.blocks, *shape), 128
    *several, n, k = shape
    columns = -(-k // scales.group)
    return array(scales.groups, torch.float32, *several, n, columns), 4, 4 * columns, scales.group, 1


def _channels(scales: Scales, several: Sequence[int]) -> tuple[Array, int]:
    """Scales of channels, and how many of them a weight has; a single one and 0 where there are none."""
    if scales.channels is None:
        return ONE, 0
    each = scales.channels.shape[-2]
    return array(scales.channels, torch.float32, *several, each, 1), each
