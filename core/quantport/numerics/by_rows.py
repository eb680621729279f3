"""Quantizes a weight some rows at a time, to the bytes that the whole weight gives.

Where no scale sees more than its own rows, that is so by itself. A scale that spans all rows follows from the
extremes of the weight, which a first pass keeps: rows that are quantized beside every step and dropped, so
that any implementation finds the same spanning scales in each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from quantport.numerics.blocks import block_amax, check_finite, group_segments
from quantport.numerics.elements import bits
from quantport.numerics.linear import check_held
from quantport.numerics.rotation import rotate
from quantport.numerics.scales import scale_of
from quantport.numerics.sharding import alignment, shard_dims
from quantport.scheme import Quant, Scheme

ReadRows = Callable[[int, int], AbstractContextManager[Tensor]]
"""Rows ``[start, stop)`` of a weight; they may be gone when the block ends."""
Quantize = Callable[[Tensor, Scheme], dict[str, Tensor]]


def spans_rows(quant: Quant) -> bool:
    """Whether a scale, of blocks, of larger blocks or of scales, sees all rows of a weight."""
    return (
        not quant.block_shape[0] or quant.scale_quant or bool(quant.outer_block and not quant.outer_block[0])
    )


def stacks(scheme: Scheme, n: int) -> bool:
    """Whether weights of ``n`` rows that stand one above the other are quantized to the bytes of each by
    itself.
    """
    by_rows = scheme.solver is None and not spans_rows(scheme.weight) and n % alignment(scheme, 0) == 0
    return by_rows and all(along == 0 for along in shard_dims(scheme, 0).values())


def rows_of_step(scheme: Scheme, n: int, k: int, elements: int, block: int = 1) -> int:
    """Rows to quantize at a time: of about so many elements, in whole blocks of the scheme and of ``block``
    rows; all ``n`` where a solver of the scheme's own may look at the whole weight.
    """
    if scheme.solver is not None:
        return n
    blocks = math.lcm(alignment(scheme, 0), block)
    return min(n, max(1, elements // max(1, k) // blocks) * blocks)


class QuantizedRows(NamedTuple):
    """Rows ``[start, stop)`` of a weight, quantized: the tensors of ``scheme.layout(stop - start, k)``."""

    start: int
    stop: int
    stored: dict[str, Tensor]


def quantize_steps(
    read: ReadRows,
    shape: tuple[int, int],
    scheme: Scheme,
    rows: int,
    quantize: Quantize,
    *,
    name: str = "weight",
    nonfinite: str = "error",
) -> Iterator[QuantizedRows]:
    """Quantizes a weight ``[n, k]``, holding some rows of it at a time; `join_steps` gives the whole.

    Args:
        read: Gives rows; called twice for each step where a scale spans all rows.
        shape: ``(n, k)``.
        scheme: The scheme.
        rows: Rows of a step, from `rows_of_step`.
        quantize: Quantizes rows with a scheme to its stored tensors, as ``numerics.quantize_weight``.
        name: Of the weight, for errors.
        nonfinite: ``error`` refuses NaN and Inf; ``zero`` reads each of them as 0.

    Raises:
        WeightError: the weight holds NaN or Inf while ``nonfinite="error"``; whatever ``quantize`` raises.
    """
    n, k = shape
    steps = [(start, min(start + rows, n)) for start in range(0, n, rows)] if rows < n else [(0, n)]
    extremes: Tensor | None = None
    for step in steps if len(steps) > 1 and spans_rows(scheme.weight) else ():
        extremes = _more_extreme(read(*step), extremes, scheme, name, nonfinite)
    room: list[Tensor] = []  # for the rows of a step above the extremes: to touch fresh pages takes as long
    for start, stop in steps:
        stored = _quantized(read(start, stop), extremes, room, scheme, name, nonfinite, quantize)
        if extremes is not None:
            own = stored_slices(scheme, k, 0, stop - start)
            stored = {key: tensor[own[key]] if own[key] else tensor for key, tensor in stored.items()}
        yield QuantizedRows(start, stop, stored)


def stored_slices(scheme: Scheme, k: int, start: int, stop: int) -> dict[str, slice | None]:
    """Which rows of each stored tensor are those of rows ``[start, stop)`` of a weight; None where all rows
    share one.
    """
    first, last = scheme.layout(start, k), scheme.layout(stop, k)
    return {
        key: None if along is None else slice(first[key][0][along], last[key][0][along])
        for key, along in shard_dims(scheme, 0).items()  # rows come first in every layout
    }


def join_steps(steps: Iterable[QuantizedRows], scheme: Scheme, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The stored tensors of the whole weight, on the device of the steps."""
    n, k = shape
    layout, joined = scheme.layout(n, k), dict[str, Tensor]()
    for start, stop, stored in steps:
        if stop - start == n:
            return stored
        for key, rows in stored_slices(scheme, k, start, stop).items():
            if rows is None:  # every step has found the same
                joined.setdefault(key, stored[key])
                continue
            if key not in joined:
                joined[key] = torch.empty(layout[key][0], dtype=layout[key][1], device=stored[key].device)
            bits(joined[key])[rows].copy_(bits(stored[key]))
    return joined


def _more_extreme(
    rows: AbstractContextManager[Tensor], extremes: Tensor | None, scheme: Scheme, name: str, nonfinite: str
) -> Tensor:
    """The extremes of some more rows and of those before."""
    with rows as part:
        both = _extremes(_values(part, scheme, nonfinite), scheme.weight, name)
    return both if extremes is None else _extremes(torch.cat((extremes, both)), scheme.weight, name)


def _quantized(
    rows: AbstractContextManager[Tensor],
    extremes: Tensor | None,
    room: list[Tensor],
    scheme: Scheme,
    name: str,
    nonfinite: str,
    quantize: Quantize,
) -> dict[str, Tensor]:
    """The stored tensors of some rows; those of the extremes, where there are any, stand below them, in
    blocks of their own.
    """
    with rows as part:
        if extremes is None:
            return quantize(part, scheme)
        x = _values(part, scheme, nonfinite)
        stored = quantize(_above(x, extremes, room, alignment(scheme, 0)), replace(scheme, rotation=0))
        if scheme.rotation:  # these rows are fp32, whatever the weight is
            check_held(stored, scheme, x, part.dtype, name)
        return stored


def _above(x: Tensor, extremes: Tensor, room: list[Tensor], blocks: int) -> Tensor:
    """Rows, filled with zeros to whole blocks of rows, and the extremes: in the room of the step before."""
    n, whole = x.shape[0], -(-x.shape[0] // blocks) * blocks
    if not room:  # no later step has more rows
        room.append(torch.empty(whole + len(extremes), x.shape[1], dtype=x.dtype, device=x.device))
    both = room[0][: whole + len(extremes)]
    both[:n].copy_(x)
    both[n:whole].zero_()
    both[whole:].copy_(extremes)
    return both


def _values(part: Tensor, scheme: Scheme, nonfinite: str) -> Tensor:
    """Rows as scales see them: rotated, where the scheme rotates."""
    if nonfinite == "zero":
        part = torch.nan_to_num(part, nan=0.0, posinf=0.0, neginf=0.0)
    return rotate(part.float(), scheme.rotation) if scheme.rotation else part


def _extremes(x: Tensor, quant: Quant, name: str) -> Tensor:
    """Rows ``[1 or 2, k]`` that alone make the spanning scales: the largest magnitude of each block of
    columns; where scales are quantized, for each group the stretch with the largest scale and that with the
    smallest.
    """
    if not quant.scale_quant:
        cols = _spanning_block(quant)[1] or x.shape[1]
        amax = block_amax(x, 0, cols if cols < x.shape[1] else 0)
        check_finite(amax, name, x)
        return amax.to(x.dtype).repeat_interleave(cols, 1)[:, : x.shape[1]]
    amax = block_amax(x, 1, quant.group_size)
    check_finite(amax, name, x)
    order = scale_of(amax, quant)
    stretches = group_segments(x, quant.group_size)
    across = torch.arange(amax.shape[1], device=x.device, dtype=torch.int64)
    both = torch.stack([stretches[order.argmax(0), across], stretches[order.argmin(0), across]])
    return both.view(2, -1)[:, : x.shape[1]]


def _spanning_block(quant: Quant) -> tuple[int, int]:
    """The block that sees all rows: that of the scales, else that of the outer ones."""
    block = quant.outer_block if quant.block_shape[0] else quant.block_shape
    assert block is not None
    return block
