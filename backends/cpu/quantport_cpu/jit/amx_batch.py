"""Multiplies int8 activations by int8 weights with AMX tiles: ``gemm_amx`` called with tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantport.backend import CodedRows, numerics
from quantport_cpu.jit import gemm_amx
from quantport_cpu.jit.gemm_amx import CHANNELS, ROWS, STEP
from quantport_cpu.jit.grouped_small_batch import HALF_RANGE
from quantport_cpu.jit.jobs import PER_TOKEN, Job
from quantport_cpu.jit.memory import Array, array, array_of_rows, table
from quantport_cpu.jit.parallel_for import threads_for
from quantport_cpu.jit.quantize_rows import scratch_bytes
from quantport_cpu.jit.small_batch import empty_fp32

_MIN_ROWS = 4  # of a job; with fewer, products of rows are faster


def takes(jobs: Sequence[Job], weight: Tensor) -> bool:
    """Whether tiles multiply by weights ``[..., N, K]``, and are the fastest way for these jobs."""
    (n, k), rows = weight.shape[-2:], sum(j.stop - j.start for j in jobs)
    is_whole = n % ROWS == 0 and k % STEP == 0 and k <= gemm_amx.MAX_COLUMNS
    return is_whole and rows >= _MIN_ROWS * len(jobs) and gemm_amx.is_usable()


class _Tiles(NamedTuple):
    """Activations as ``gemm_amx.kernel`` reads them, the rows of each job padded to 16.

    Attributes:
        codes: int8 ``[blocks, 16 * K]``.
        scales: fp32 ``[blocks, 16]``.
        first_block: The number of the first block of a job, by its first row.
    """

    codes: Array
    scales: Array
    first_block: Mapping[int, int]


def int8_int8(
    x: Tensor | CodedRows, jobs: Sequence[Job], codes: Tensor, channels: Tensor, width: int
) -> Tensor:
    """Quantizes activations to int8, with a scale for each row, and multiplies: exact sums, times both
    scales in fp32.

    Args:
        x: ``[M, K]``, any floating dtype; or int8 codes that they are already.
        jobs: Which rows meet which weight.
        codes: int8 ``[..., N, K]``, contiguous, of a shape that ``takes`` allows: one weight, or several.
        channels: fp32 ``[..., N, 1]``, or ``[..., 1, 1]`` for one scale of a weight; contiguous.
        width: Columns of the result.

    Returns:
        fp32 ``[M, width]``.
    """
    rows = x.codes if isinstance(x, CodedRows) else x
    (m, k), (*several, n, _), scales = rows.shape, codes.shape, channels.shape[-2]
    tiles, out = _tiles(x, jobs), empty_fp32(rows, m, width)
    to = array(out, torch.float32, m, width)
    weights = array(codes, torch.int8, *several, n, k)
    factors = array(channels, torch.float32, *several, scales, 1)

    def line(job: Job) -> Sequence[Array | int]:
        first, rows = tiles.first_block[job.start], job.stop - job.start
        start, padded = ROWS * first, -(-rows // ROWS) * ROWS
        return (
            tiles.codes.at(start * k, padded * k),
            tiles.scales.at(4 * start, 4 * padded),
            weights.at(job.weight * n * k, n * k),
            factors.at(4 * job.weight * scales, 4 * scales),
            to.at(4 * (job.start * width + job.column), 4 * ((rows - 1) * width + n)),
            rows,
        )

    blocks = -(-n // CHANNELS)
    gemm_amx.kernel(
        blocks * len(jobs),
        table(line(job) for job in jobs),
        blocks,
        n,
        k,
        4 if scales > 1 else 0,
        4 * width,
        threads=threads_for(n * k * len(jobs)),
    )
    return out


def _tiles(x: Tensor | CodedRows, jobs: Sequence[Job]) -> _Tiles:
    known = x[:2] if isinstance(x, CodedRows) else None
    x = x.codes if isinstance(x, CodedRows) else x
    m, k = x.shape
    blocks: list[tuple[int, int]] = []  # the first row, and how many there are
    first_block: dict[int, int] = {}
    for start, stop in dict.fromkeys((j.start, j.stop) for j in jobs):
        first_block[start] = len(blocks)
        blocks += [(row, min(ROWS, stop - row)) for row in range(start, stop, ROWS)]
    source: tuple[Array | int, int] = (0, 0)
    if x.dtype is torch.bfloat16 and x.stride(1) == 1:
        q, token = scratch_bytes(x, m * k), scratch_bytes(x, 4 * m)
        source = (array_of_rows(x, torch.bfloat16, m, k), 2 * x.stride(0))
    else:
        values, scale = known or numerics.quantize(x, PER_TOKEN)
        q, token = array(values, torch.int8, m, k), array(scale, torch.float32, m, 1)
    rows = ROWS * len(blocks)
    codes, scales = scratch_bytes(x, rows * k), scratch_bytes(x, 4 * rows)
    gemm_amx.prepare_kernel(
        len(blocks),
        table(blocks),
        q,
        k,
        codes,
        scales,
        *source,
        token,
        HALF_RANGE,
        threads=threads_for(m * k),
    )
    return _Tiles(codes, scales, first_block)
