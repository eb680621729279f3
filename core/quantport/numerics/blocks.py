"""Block quantization of a matrix, in fp32 arithmetic, chunked by rows so that scratch stays in cache.

``code = encode(x / scale)`` by true division, with the scale already rounded to its stored format; ``value =
code * scale`` (``+ zero`` where blocks have offsets). ``scales`` says how a scale follows from its block,
``elements`` how codes are rounded, ``search`` which scales are searched for.

Two levels. NVFP4 (e4m3fn scales): one factor ``g = 448 * 6 / amax`` for the outer block, ``scale = e4m3fn(g *
amax_b / 6)``, and codes of ``x / (scale / g)``: the arithmetic of compressed-tensors (``generate_gparam``).
Dual scale (e8m0 scales): one factor ``s = amax / 6`` for each outer block, then ``x / s`` rounded to the
dtype of x is quantized in one level: the documentation of Ascend's ``npu_dynamic_dual_level_mx_quant``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quantport.errors import WeightError
from quantport.numerics import search
from quantport.numerics.elements import decode, encode, raw
from quantport.numerics.scales import global_factor, over, scale_of, scale_values, stored
from quantport.scheme.quant import Quant, blocks_of

CHUNK = 1 << 18  # elements of fp32 scratch: 1 MiB, which fits the L2 cache of one core
LARGE = CHUNK << 1  # of an accelerator, which wants few large kernels

Reduce = Callable[[Tensor, int, int], Tensor]
"""Largest magnitudes of this shard, and the (rows, cols) of their blocks (0: all) -> the maxima over every
shard.
"""


class Blocks(NamedTuple):
    """A quantized matrix: codes ``[n, k]``, scales, and offsets and outer scales where the Quant has them."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    outer: Tensor | None = None


def quantize(x: Tensor, quant: Quant, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantizes a matrix with one level of scales and no offsets.

    Args:
        x: ``[n, k]``, any floating dtype. NaN and Inf are not looked for: they show up in the scales.
        quant: Element format, block shape and scale rule.
        scale: Scales to use instead of those of the rule: of ``quant.scale_dtype`` (or fp32 values of it; of
            e8m0 the bytes), of shape ``quant.scale_shape(n, k)``.

    Returns:
        ``(codes, scale)``: codes ``[n, k]`` of the element's storage dtype, scale of ``quant.scale_dtype``
        and shape ``quant.scale_shape(n, k)``.
    """
    codes, scales, zero, outer = quantize_blocks(x, quant, scale)
    assert zero is None is outer  # use quantize_blocks, which returns these too
    return codes, scales


def quantize_blocks(
    x: Tensor, quant: Quant, scale: Tensor | None = None, reduce: Reduce | None = None
) -> Blocks:
    """Quantizes a matrix with whatever its Quant asks for; arguments as for ``quantize``.

    Args:
        x: ``[n, k]``.
        quant: Any Quant but GGUF's block types and bf16.
        scale: As for ``quantize``; not for a Quant with offsets, which are searched for together with scales.
        reduce: For a shard of a larger matrix: takes maxima over the shards where a scale spans them.
    """
    n, k = x.shape
    outer = _outer(x, quant, reduce) if quant.outer_block and x.numel() else None
    # a scale sees more than one chunk of rows
    spans = not quant.block_shape[0] or (reduce is not None and not quant.group_size)
    if scale is None and spans and x.numel():
        amax = block_amax(x, quant.block_shape[0], quant.group_size)
        scale = scale_of(reduce(amax, quant.block_shape[0], quant.group_size) if reduce else amax, quant)
    out = _empty(x, quant, outer)
    if scale is not None:
        in_storage = scale if scale.dtype is out.scale.dtype else stored(scale, quant.scale)
        raw(out.scale).copy_(raw(in_storage))
    if not x.numel():
        return out
    step = _chunk_rows(x.shape, quant, x.device)
    for i in range(0, n, step):
        chunk = x[i : i + step]
        r = (
            slice(i // quant.block_shape[0], -(-(i + chunk.shape[0]) // quant.block_shape[0]))
            if quant.block_shape[0]
            else slice(0, 1)
        )
        if outer is not None and quant.scale == "e8m0":
            chunk = _divided(chunk, outer[i : i + step], quant)
        factor = (
            None
            if outer is None or quant.scale == "e8m0"
            else outer[i : i + step]
            if len(outer) > 1
            else outer
        )
        blocks = _blocks(
            chunk.to(torch.float32, copy=True), quant.block_shape[0], quant.group_size, edge=quant.zero_point
        )
        codes = raw(_chunk(blocks, quant, out, r, scale is not None, factor))
        raw(out.codes)[i : i + step].copy_(
            codes.view(-1, codes.shape[2] * codes.shape[3])[: chunk.shape[0], :k]
        )
    return out


def _chunk(
    blocks: Tensor, quant: Quant, out: Blocks, r: slice, scales_known: bool, factor: Tensor | None
) -> Tensor:
    """Codes of one chunk of blocks ``[R, rows, C, cols]``; writes its scales and offsets unless they are
    known.
    """
    if quant.zero_point:
        assert out.zero is not None
        codes, out.scale[r], out.zero[r] = search.with_offset(blocks[:, 0], quant)
        return codes[:, None]
    if not scales_known:
        amax = blocks.abs().amax((1, 3))
        if factor is None:
            scale = scale_of(amax, quant)
        else:
            scale = stored(factor.view(-1, 1) * over(amax, quant.element.half_range), quant.scale)
        if quant.searched:
            scale = search.scale(blocks[:, 0], scale, quant, factor)
        raw(out.scale)[r] = raw(scale)
    divisor = scale_values(out.scale[r], quant.scale)
    if factor is not None:
        divisor = divisor / factor.view(-1, 1)
    return encode(blocks.div_(divisor[:, None, :, None]), quant.element)


def _empty(x: Tensor, quant: Quant, outer: Tensor | None) -> Blocks:
    n, k = x.shape
    codes = torch.empty((n, k), dtype=quant.element.storage, device=x.device)
    shape = quant.scale_shape(n, k)
    empty = (
        stored(torch.zeros(shape, dtype=torch.float32, device=x.device), quant.scale)
        if quant.scale != "e8m0"
        else None
    )
    scale = torch.zeros(shape, dtype=torch.uint8, device=x.device) if empty is None else empty
    if quant.outer_block and outer is None:
        outer = torch.ones(blocks_of(n, k, *quant.outer_block), dtype=torch.float32, device=x.device)
    return Blocks(codes, scale, torch.zeros_like(scale) if quant.zero_point else None, outer)


def _outer(x: Tensor, quant: Quant, reduce: Reduce | None) -> Tensor:
    """The outer factors of a matrix: fp32, one for each outer block."""
    assert quant.outer_block
    amax = block_amax(x, *quant.outer_block)
    amax = reduce(amax, *quant.outer_block) if reduce else amax
    if quant.scale == "e8m0":
        first = stored(over(amax, quant.element.half_range), "fp32")
        if not quant.searched:
            return first
        step = max(1, CHUNK // padded(x.shape[1], quant))
        rows = range(0, x.shape[0], step)
        parts = [
            search.outer(
                _blocks(x[i : i + step].float(), *quant.outer_block)[:, 0], first[i : i + step], quant
            )
            for i in rows
        ]
        return torch.cat(parts)
    return global_factor(amax, quant.element)


def _divided(chunk: Tensor, outer: Tensor, quant: Quant) -> Tensor:
    """Rows divided by their outer scales, rounded to their own dtype."""
    assert quant.outer_block
    blocks = _blocks(chunk.float(), 1, quant.outer_block[1])
    return (blocks / outer[:, None, :, None]).to(chunk.dtype).view(chunk.shape[0], -1)[:, : chunk.shape[1]]


def block_amax(x: Tensor, rows: int, cols: int) -> Tensor:
    """Largest magnitude of each block of ``rows`` x ``cols`` (0: all): fp32, NaN kept."""
    if not rows and not cols:  # one pass over the matrix, many times faster than by columns
        low, high = torch.aminmax(x)
        return torch.maximum(-low, high).float().abs().view(1, 1)
    if not rows:
        # two passes: one ``aminmax`` along columns takes eight times as long
        x, rows = torch.maximum(-x.amin(0), x.amax(0))[None], 1
    n, k = x.shape
    step = max(rows, CHUNK // max(1, k) // rows * rows)
    return torch.cat(
        [_blocks(x[i : i + step].float(), rows, cols).abs().amax((1, 3)) for i in range(0, n, step)]
    )


def group_segments(x: Tensor, cols: int) -> Tensor:
    """The groups of ``cols`` columns (0: all) of each row: ``[n, groups, cols]``, the last filled with 0."""
    return _blocks(x, 1, cols)[:, 0]


def _blocks(x: Tensor, rows: int, cols: int, edge: bool = False) -> Tensor:
    """Views a chunk ``[r, k]`` as ``[R, rows, C, cols]``; a short last block is filled with zeros, or with
    its edge.
    """
    rows, cols = rows or x.shape[0], cols or x.shape[1]
    right, below = -x.shape[1] % cols, -x.shape[0] % rows
    if edge and right:
        x = torch.cat((x, x[:, -1:].expand(-1, right)), 1)
    elif right or below:
        x = torch.nn.functional.pad(x, (0, right, 0, below))
    return x.view(x.shape[0] // rows, rows, x.shape[1] // cols, cols)


def _chunk_rows(shape: torch.Size, quant: Quant, device: torch.device) -> int:
    step = quant.block_shape[0] or 1
    return max(
        step, (CHUNK if device.type == "cpu" else LARGE) // max(1, padded(shape[1], quant)) // step * step
    )


def padded(k: int, quant: Quant) -> int:
    """Width of rows of ``k`` elements in whole blocks."""
    cols = max(quant.group_size, quant.outer_block[1] if quant.outer_block else 0)
    return -(-k // cols) * cols if cols else k


def dequantize(
    codes: Tensor,
    scale: Tensor,
    quant: Quant,
    dtype: torch.dtype = torch.float32,
    zero: Tensor | None = None,
    outer: Tensor | None = None,
) -> Tensor:
    """Returns ``code * scale (+ zero)`` as ``[n, k]``; computed in fp32 and rounded once to ``dtype``."""
    factor = scale_values(scale, quant.scale)
    if outer is not None and quant.scale != "e8m0":
        factor = factor / outer.view(-1, 1)
    value, block = decode(codes, quant.element).contiguous(), (quant.block_shape[0], quant.group_size)
    _each_block(torch.Tensor.mul_, value, factor, *block)
    if zero is not None:
        _each_block(torch.Tensor.add_, value, scale_values(zero, quant.scale), *block)
    if outer is not None and quant.scale == "e8m0":
        assert quant.outer_block
        _each_block(torch.Tensor.mul_, value, outer, *quant.outer_block)
    return value.to(dtype)


def _each_block(
    change: Callable[[Tensor, Tensor], Tensor], value: Tensor, by: Tensor, rows: int, cols: int
) -> None:
    """Changes ``[n, k]`` in place by one number for each block of ``rows`` (0: all) by ``cols`` (0: all)."""
    n, k = value.shape
    rows, cols = rows or max(n, 1), cols or max(k, 1)
    if n % rows == 0 and k % cols == 0:
        change(value.view(n // rows, rows, k // cols, cols), by[:, None, :, None])
    else:
        wide = by.repeat_interleave(cols, 1)[:, :k]
        change(value, wide if rows == 1 else wide.repeat_interleave(rows, 0)[:n])


def check_finite(value: Tensor, name: str, weight: Tensor) -> None:
    """Refuses a weight of which a value or a scale is not finite: it holds a NaN or an Inf, or they overflow.

    Raises:
        WeightError: names the weight.
    """
    if torch.isfinite(value).all():
        return
    if torch.isfinite(weight).all():
        found = f"values up to {weight.abs().max():.3g}, which overflow in this format"
        suggestion = "floats with fp32 scales, for example fp8_weight_only, or add the layer to ignore="
        raise WeightError(f"quantize {name}", found, suggestion)
    raise WeightError(
        f"quantize {name}",
        "the weight holds NaN or Inf",
        "mend the checkpoint, add the layer to ignore=, or pass nonfinite='zero' to read them as 0",
    )
