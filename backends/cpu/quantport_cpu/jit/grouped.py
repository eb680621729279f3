"""The kernels for few rows over many weights in one launch: each group of rows is multiplied by weights of
its own.

A job is one weight with up to 8 rows: five to seven words of a table. A block is a span of output channels of
one job, so threads share the work of all jobs evenly, whatever the number of rows of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantport.backend import BackendError
from quantport_cpu.jit import dots, nibbles
from quantport_cpu.jit.frame import Kernel, take, threads_for, word
from quantport_cpu.jit.gemv import blocks_of_128, digits_of, fp32, padded
from quantport_cpu.jit.memory import Array, array, table

_SPAN = 32  # weight rows that a thread takes at a time; it divides the 128 rows of a block of scales
_MOST = 8  # rows of a job


class Job(NamedTuple):
    """Rows ``start`` to ``stop - 1`` of the activations, for the weight ``weight``, to columns from
    ``column`` on.
    """

    start: int
    stop: int
    weight: int
    column: int


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
    (m, _), (n, k) = x.shape, codes[0].shape
    columns, jobs = -(-k // dots.STEP) * dots.STEP, _short(jobs)
    values, out = array(padded(x, m, columns), torch.float32, m, columns), fp32(x, m, width)
    to, stride = array(out, torch.float32, m, width), 4 * columns
    _, step, scale_stride, chunk = blocks_of_128(scales[0] if scales else None, n, k)
    lines = table(
        (
            values.at(stride * a, stride * (b - a)),
            array(codes[w], torch.uint8, n, k),
            blocks_of_128(scales[w] if scales else None, n, k)[0],
            _part(to, width, a, b, c, n),
            b - a,
        )
        for a, b, w, c in jobs
    )
    blocks = -(-n // _SPAN)
    fp8_kernel(
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
        _SPAN,
        threads=threads_for(n * k * len(jobs)),
    )
    return out


def int8(x: Tensor, jobs: Sequence[Job], codes: Sequence[Tensor], width: int) -> Tensor:
    """int8 weights, as ``fp8`` without scales."""
    (m, _), (n, k) = x.shape, codes[0].shape
    columns, jobs = -(-k // 64) * 64, _short(jobs)
    planes, scale, _ = digits_of(x, m, columns, 0)
    out = fp32(x, m, width)
    to = array(out, torch.float32, m, width)
    lines = table(
        (
            planes.at(3 * columns * a, 3 * columns * (b - a)),
            scale.at(4 * a, 4 * (b - a)),
            array(codes[w], torch.int8, n, k),
            _part(to, width, a, b, c, n),
            b - a,
        )
        for a, b, w, c in jobs
    )
    blocks = -(-n // _SPAN)
    int8_kernel(
        blocks * len(jobs),
        lines,
        blocks,
        3 * columns,
        n,
        k,
        4 * width,
        _SPAN,
        threads=threads_for(n * k * len(jobs)),
    )
    return out


def int4(
    x: Tensor, jobs: Sequence[Job], packed: Sequence[Tensor], pairs: Sequence[Tensor], group: int, width: int
) -> Tensor:
    """int4 weights in ATen's layout for blocks of 64 channels, see ``gemv.int4``."""
    m, n, k = x.shape[0], packed[0].shape[0], 2 * packed[0].shape[1]
    groups, jobs = k // group, _short(jobs)
    planes, scale, sums = digits_of(x, m, k, group)
    out = fp32(x, m, width)
    to = array(out, torch.float32, m, width)
    lines = table(
        (
            planes.at(3 * k * a, 3 * k * (b - a)),
            sums.at(48 * groups * a, 48 * groups * (b - a)),
            scale.at(4 * a, 4 * (b - a)),
            array(packed[w], torch.uint8, n, k // 2),
            array(pairs[w], torch.bfloat16, groups, n, 2),
            _part(to, width, a, b, c, n),
            b - a,
        )
        for a, b, w, c in jobs
    )
    blocks = n // nibbles.BLOCK
    int4_kernel(
        blocks * len(jobs), lines, blocks, n, k, group, 4 * width, threads=threads_for(n * k * len(jobs))
    )
    return out


def _part(out: Array, width: int, start: int, stop: int, column: int, n: int) -> Array:
    """Where ``n`` columns of rows ``start`` to ``stop - 1`` begin, in an fp32 result of ``width`` columns."""
    if column < 0 or column + n > width:
        raise BackendError(
            "write products to a group",
            f"columns {column} to {column + n} of {width}",
            "columns of the result",
        )
    return out.at(4 * (start * width + column), 4 * ((stop - start - 1) * width + n))


def _short(jobs: Sequence[Job]) -> list[Job]:
    return [
        Job(a, min(a + _MOST, j.stop), j.weight, j.column)
        for j in jobs
        for a in range(j.start, j.stop, _MOST)
    ]


def _fp8(frame):
    """Words of a job: x fp32, codes, scales, out, rows."""
    table, per, x_stride, n, k = (
        word(frame, 2),
        word(frame, 3),
        word(frame, 4),
        word(frame, 5),
        word(frame, 6),
    )
    scale_step, scale_stride, chunk = word(frame, 7), word(frame, 8), word(frame, 9)
    out_stride, span = word(frame, 10), word(frame, 11)
    while True:
        block = take(frame)
        if block >= word(frame, 1):
            break
        job, first = table + 40 * (block // per), block % per * span
        x, w, out, m = word(job, 0), word(job, 1), word(job, 3), word(job, 4)
        s = word(job, 2) + (first >> 7) * scale_stride
        for row in range(first, min(n, first + span), 2):
            stride = k if row + 1 < n else 0
            here, to, at, left = w + row * k, out + 4 * row, x, m
            if left >= 8:
                dots.fp8_tile(at, x_stride, here, stride, k, chunk, s, scale_step, to, out_stride, 8)
                at, to, left = at + 8 * x_stride, to + 8 * out_stride, left - 8
            if left >= 4:
                dots.fp8_tile(at, x_stride, here, stride, k, chunk, s, scale_step, to, out_stride, 4)
                at, to, left = at + 4 * x_stride, to + 4 * out_stride, left - 4
            if left >= 2:
                dots.fp8_tile(at, x_stride, here, stride, k, chunk, s, scale_step, to, out_stride, 2)
                at, to, left = at + 2 * x_stride, to + 2 * out_stride, left - 2
            if left >= 1:
                dots.fp8_tile(at, x_stride, here, stride, k, chunk, s, scale_step, to, out_stride, 1)


def _int8(frame):
    """Words of a job: digits of x, their scales, codes, out, rows."""
    table, per, x_stride, n, k = (
        word(frame, 2),
        word(frame, 3),
        word(frame, 4),
        word(frame, 5),
        word(frame, 6),
    )
    out_stride, span = word(frame, 7), word(frame, 8)
    while True:
        block = take(frame)
        if block >= word(frame, 1):
            break
        job, first = table + 40 * (block // per), block % per * span
        x, x_scale, w, out, m = word(job, 0), word(job, 1), word(job, 2), word(job, 3), word(job, 4)
        for row in range(first, min(n, first + span), 2):
            stride = k if row + 1 < n else 0
            here, to = w + row * k, out + 4 * row
            for i in range(0, m - 1, 2):
                dots.int8_tile(
                    x + i * x_stride,
                    x_stride,
                    x_scale + 4 * i,
                    here,
                    stride,
                    k,
                    to + i * out_stride,
                    out_stride,
                    2,
                )
            if m & 1:
                i = m - 1
                dots.int8_tile(
                    x + i * x_stride,
                    x_stride,
                    x_scale + 4 * i,
                    here,
                    stride,
                    k,
                    to + i * out_stride,
                    out_stride,
                    1,
                )


def _int4(frame):
    """Words of a job: digits of x, their sums, their scales, nibbles, scales, out, rows."""
    table, per, n, k, group = word(frame, 2), word(frame, 3), word(frame, 4), word(frame, 5), word(frame, 6)
    out_stride = word(frame, 7)
    x_stride, sums_stride, pairs_stride = 3 * k, k // group * 48, 4 * n
    while True:
        block = take(frame)
        if block >= word(frame, 1):
            break
        job, b = table + 56 * (block // per), block % per
        x, sums, x_scale, m = word(job, 0), word(job, 1), word(job, 2), word(job, 6)
        here, scales, to = word(job, 3) + b * 32 * k, word(job, 4) + 256 * b, word(job, 5) + 256 * b
        for i in range(0, m - 1, 2):
            nibbles.int4_tile(
                x + i * x_stride,
                x_stride,
                sums + i * sums_stride,
                sums_stride,
                x_scale + 4 * i,
                here,
                k,
                group,
                scales,
                pairs_stride,
                to + i * out_stride,
                out_stride,
                2,
            )
        if m & 1:
            i = m - 1
            nibbles.int4_tile(
                x + i * x_stride,
                x_stride,
                sums + i * sums_stride,
                sums_stride,
                x_scale + 4 * i,
                here,
                k,
                group,
                scales,
                pairs_stride,
                to + i * out_stride,
                out_stride,
                1,
            )


fp8_kernel = Kernel(_fp8)
int8_kernel = Kernel(_int8)
int4_kernel = Kernel(_int4)
