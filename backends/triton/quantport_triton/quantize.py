"""Quantization on the device: activations at every call, weights at load. Equal to ``quantport.numerics``
byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantport.backend import Quant, numerics
from quantport_triton import compiles_for
from quantport_triton.launch import Config, launch, target_of
from quantport_triton.tuned import way

FORMATS = ("e4m3fn", "int8", "int4", "e2m1", "e2m3", "e3m2", "nf4", "fp4")
SMALL = ("e4m3fn", "e2m1", "e2m3", "e3m2")
MOST = 1 << 15  # elements of a block that one program holds


class Quantized(NamedTuple):
    """A quantized matrix ``[m, k]``.

    Attributes:
        codes: 8-bit codes ``[m, k]`` (float8 as float8), or packed codes of 4 or 6 bits, uint8 ``[m, bytes]``
            (``pack_bits``; int4: ``pack_int4``, int32 ``[m, ceil(k / 8)]``).
        scale: Scales as ``numerics.quantize_blocks`` stores them: ``[m, blocks]`` of
            ``quant.scale_dtype`` (e8m0: uint8).
        outer: Outer scales, fp32, where the Quant has them: nvfp4 ``[m, 1]``, dual scale ``[m, ceil(k /
            512)]``.
    """

    codes: Tensor
    scale: Tensor
    outer: Tensor | None = None


def quantize(x: Tensor, quant: Quant, swizzle: bool = False, transposed: bool = False) -> Quantized:
    """Quantizes a matrix ``[m, k]``, bf16, fp16 or fp32.

    Args:
        x: The matrix; rows need not follow one another.
        quant: One without offsets.
        swizzle: Scales in the layout that cuBLASLt reads block scales in (SWIZZLE_32_4_4), padded with zeros
            to whole tiles: ``[ceil(m / 128) * 128, ceil(blocks / 4) * 4]``.
        transposed: Scales in memory by columns: ``[m, blocks]`` with strides ``(1, m)``, as
            ``_scaled_mm`` wants those of 1x128.
    """
    if not serves(quant) or not x.numel() or not compiles_for(target_of(x.device)):
        return _reference(x, quant, swizzle, transposed)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = _empty(x, quant, swizzle, transposed)
    if quant.block_shape[0] == 0:
        _whole(x.contiguous(), quant, out)
    elif quant.block_shape[0] > 1:
        _squares(x, quant, out)
    elif quant.group_size and quant.outer_block != (1, 0):
        _groups(x, quant, out, swizzle)
    else:
        _rows(x, quant, out, swizzle)
    return out._replace(scale=_as(out.scale, quant.scale_dtype), codes=_as(out.codes, _codes_dtype(quant)))


def serves(quant: Quant) -> bool:
    """Whether there is a kernel for a Quant: one level of scales of any block, or two of groups, whose
    columns fill whole words.
    """
    cols, whole = quant.group_size, quant.group_size % _per_word(quant) == 0
    if (
        quant.format not in FORMATS
        or quant.zero_point
        or quant.scale_quant
        or not whole
        or max(quant.block_shape[0], 1) * cols > MOST
    ):
        return False
    if quant.searched and (quant.rule != "mse" or not _power_of_two(cols)):
        return False
    if quant.scale in ("e8m0", "e4m3fn"):
        return quant.block_shape[0] == 1 and cols > 0 and quant.format in SMALL and _outer_served(quant)
    if quant.outer_block is not None or quant.searched:
        return False
    return (
        cols > 0
        if quant.block_shape[0] > 1
        else quant.block_shape[0] == 1 or (cols == 0 and quant.element.bits == 8)
    )


def _outer_served(quant: Quant) -> bool:
    if quant.outer_block is None:
        return True
    if quant.scale == "e8m0":
        down, across = quant.outer_block
        return (
            down == 1
            and across % quant.group_size == 0
            and _power_of_two(quant.group_size)
            and _power_of_two(across)
        )
    return quant.outer_block == (0, 0) or (
        quant.outer_block == (1, 0) and _power_of_two(quant.group_size) and not quant.searched
    )


def _power_of_two(number: int) -> bool:
    return number > 0 and not number & (number - 1)


def _per_word(quant: Quant) -> int:
    """Codes of the smallest word that a group must fill."""
    return 8 if quant.format == "int4" else {8: 1, 6: 4, 4: 2}.get(quant.element.bits, 1)


def _codes_dtype(quant: Quant) -> torch.dtype:
    return (
        quant.element.storage
        if quant.element.bits == 8
        else torch.int32
        if quant.format == "int4"
        else torch.uint8
    )


def _as(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bits under another dtype: kernels store float8 and bf16 as integers."""
    return stored if stored.dtype is dtype else stored.view(dtype)


def _reference(x: Tensor, quant: Quant, swizzle: bool, transposed: bool) -> Quantized:
    blocks = numerics.quantize_blocks(x, quant)
    codes, scale = blocks.codes, blocks.scale
    if quant.element.bits < 8:
        codes = (
            numerics.pack_int4(codes)
            if quant.format == "int4"
            else numerics.pack_bits(codes, quant.element.bits)
        )
    if swizzle:
        scale = swizzled(scale)
    elif transposed:
        scale = scale.t().contiguous().t()
    return Quantized(codes, scale, blocks.outer)


def swizzled(scale: Tensor) -> Tensor:
    """Scales of one byte ``[m, blocks]`` in the layout SWIZZLE_32_4_4: tiles of 128 x 4, in which row r is at
    ``r % 32``, and there at ``r // 32``. Source: cuBLAS, "1D Block Scaling Factors Layout"."""
    rows, groups = -(-scale.shape[0] // 128), -(-scale.shape[1] // 4)
    padded = scale.new_zeros(128 * rows, 4 * groups, dtype=torch.uint8)
    padded[: scale.shape[0], : scale.shape[1]] = scale.view(torch.uint8)
    tiles = padded.view(rows, 4, 32, groups, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(128 * rows, 4 * groups).view(scale.dtype)


def unswizzled(scale: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of ``swizzled``: ``[rows, columns]``."""
    tiles = scale.view(-(-rows // 128), -(-columns // 4), 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-(-rows // 128) * 128, -(-columns // 4) * 4)[:rows, :columns].contiguous()


def _empty(x: Tensor, quant: Quant, swizzle: bool, transposed: bool) -> Quantized:
    """The tensors of the result, as the kernels write them."""
    m, k = x.shape
    width = {8: k, 6: 3 * -(-k // 4), 4: -(-k // 8) if quant.format == "int4" else -(-k // 2)}[
        quant.element.bits
    ]
    codes = x.new_empty(m, width, dtype=torch.int32 if quant.format == "int4" else torch.uint8)
    dtype = {"fp32": torch.float32, "bf16": torch.int16}.get(quant.scale, torch.uint8)
    rows, groups = quant.scale_shape(m, k)
    if swizzle:
        scale = x.new_zeros(-(-rows // 128) * 128, -(-groups // 4) * 4, dtype=dtype)
    elif transposed:
        scale = x.new_empty(groups, rows, dtype=dtype).t()
    else:
        scale = x.new_empty(rows, groups, dtype=dtype)
    shape = replace(quant, block_shape=quant.outer_block).scale_shape(m, k) if quant.outer_block else None
    return Quantized(codes, scale, x.new_empty(shape, dtype=torch.float32) if shape else None)


class _Call(NamedTuple):
    """What every launch for one matrix has: pointers, numbers, constants, and how kernels are cut."""

    tensors: dict[str, Tensor]
    numbers: dict[str, int]
    constants: dict[str, Any]
    blocks: Mapping[str, int]


def _call(x: Tensor, quant: Quant, out: Quantized) -> _Call:
    (m, k), bits = x.shape, quant.element.bits
    row = out.codes.shape[1] * out.codes.element_size()
    size = 1 if bits == 8 else 3 if bits == 6 else 4 if row % 4 == 0 and quant.group_size % 8 == 0 else 1
    tensors = {"x": x, "codes": out.codes.view(torch.uint8), "scale": out.scale}
    numbers = {
        "N": m,
        "K": k,
        "stride": x.stride(0),
        "words_per_row": row // size,
        "groups_per_row": quant.scale_shape(m, k)[1],
    }
    constants = {
        "FORMAT": quant.format,
        "BITS": bits,
        "BYTES": size,
        "WHOLE_WORDS": k % (size * 8 // bits) == 0,
        "SCALE": quant.scale,
        "HALF_RANGE": quant.element.half_range,
    }
    return _Call(tensors, numbers, constants, tuned(x, "search" if quant.searched else "quantize"))


def tuned(x: Tensor, family: str) -> Mapping[str, int]:
    """How kernels of a family are cut for a matrix.

    ``TILE`` elements of a tile, ``PER_WARP`` of them for each warp, ``ROW`` of a row
    that stays in registers, and ``STEPS`` tiles of a program that only looks for a maximum."""
    return way(target_of(x.device), family, x.shape[0])[1].blocks


def cut_of(blocks: dict[str, int], elements: int, per_warp: int) -> Config:
    """The configuration for tiles of so many elements, without fusion, which would change bits."""
    return Config(blocks, min(max(elements // per_warp, 1), 16), 1, fusion=False)


def _steps(out: Quantized, swizzle: bool) -> dict[str, int]:
    """Where scales go."""
    return {
        "row_step": out.scale.shape[1] // 4 if swizzle else out.scale.stride(0),
        "group_step": out.scale.stride(1),
    }


def _groups(x: Tensor, quant: Quant, out: Quantized, swizzle: bool) -> None:
    from quantport_triton.ops import quantize as ops

    call = _call(x, quant, out)
    span, padded = (
        quant.outer_block[1] if quant.outer_block and quant.outer_block[1] else quant.group_size,
        power_above(quant.group_size),
    )
    across = min(
        power_above(-(-x.shape[1] // span)) * (span // quant.group_size),
        max(call.blocks["TILE"] // padded, span // quant.group_size),
    )
    down = min(max(call.blocks["TILE"] // (across * padded), 1), power_above(x.shape[0]))
    config = cut_of({"P": padded, "BR": down, "BG": across}, down * across * padded, call.blocks["PER_WARP"])
    outer = 0 if quant.outer_block is None else quant.outer_block[1] or -1
    tensors = {**call.tensors, "outer": out.outer if out.outer is not None else out.scale}
    tensors["top"] = _largest(x.contiguous()) if outer == -1 else call.tensors["codes"]
    grid = -(-x.shape[0] // down) * -(-call.numbers["groups_per_row"] // across)
    rule = {
        "ROUNDING": _up(quant),
        "EMAX": math.frexp(quant.element.high)[1] - 1,
        "GROUP": quant.group_size,
        "OUTER": outer,
        "GROUP_LOG2": padded.bit_length() - 1,
        "OUTER_LOG2": max(outer, 1).bit_length() - 1,
        "SEARCH": quant.searched,
        "SWIZZLE": swizzle,
    }
    launch(
        ops.groups,
        (grid,),
        config,
        tensors,
        {**call.numbers, **_steps(out, swizzle)},
        **call.constants,
        **rule,
    )


def _up(quant: Quant) -> int:
    """What a rule of e8m0 scales adds to the bits of a maximum, so that its exponent is that of the scale; -1
    for ``rceil``.
    """
    mantissa = quant.element.mantissa
    half = {"even": 1 << (22 - mantissa), "even1": 1 << 21, "ceil": (1 << 23) - 1, "rceil": -1}
    return half.get(quant.rule, 0)


def _rows(x: Tensor, quant: Quant, out: Quantized, swizzle: bool) -> None:
    from quantport_triton.ops import quantize as ops

    call = _call(x, quant, out)
    block = max(min(power_above(x.shape[1]), call.blocks["ROW"]), quant.group_size, 8)
    padded = quant.group_size or block
    config = cut_of({"BG": block // padded, "P": padded}, block, call.blocks["PER_WARP"])
    tensors = {**call.tensors, "outer": out.outer if out.outer is not None else out.scale}
    rest = {"GROUP": quant.group_size, "SWIZZLE": swizzle, "READ_ONCE": block >= x.shape[1]}
    launch(
        ops.rows,
        (x.shape[0],),
        config,
        tensors,
        {**call.numbers, **_steps(out, swizzle)},
        **call.constants,
        **rest,
    )


def _squares(x: Tensor, quant: Quant, out: Quantized) -> None:
    from quantport_triton.ops import quantize_blocks as ops

    call = _call(x, quant, out)
    down, across = power_above(quant.block_shape[0]), power_above(quant.group_size)
    config = cut_of({"BR": down, "P": across}, down * across, call.blocks["PER_WARP"])
    grid = -(-x.shape[0] // quant.block_shape[0]) * call.numbers["groups_per_row"]
    launch(
        ops.squares,
        (grid,),
        config,
        call.tensors,
        call.numbers,
        **call.constants,
        ROWS=quant.block_shape[0],
        GROUP=quant.group_size,
    )


def _whole(x: Tensor, quant: Quant, out: Quantized) -> None:
    from quantport_triton.ops import quantize_blocks as ops

    call = _call(x, quant, out)
    block = call.blocks["TILE"]
    tensors = {**call.tensors, "top": _largest(x)}
    constants = {key: call.constants[key] for key in ("FORMAT", "SCALE", "HALF_RANGE")}
    config = cut_of({"BLOCK": block}, block, call.blocks["PER_WARP"])
    launch(ops.whole, (-(-x.numel() // block),), config, tensors, {"size": x.numel()}, **constants)


def _largest(x: Tensor) -> Tensor:
    """Bits of the largest magnitude of a matrix without gaps: int32 ``[1]``."""
    from quantport_triton.ops import quantize_blocks as ops

    top, blocks = x.new_zeros(1, dtype=torch.int32), tuned(x, "quantize")
    block, steps = blocks["TILE"], blocks["STEPS"]
    config = cut_of({"BLOCK": block, "STEPS": steps}, block, blocks["PER_WARP"])
    launch(
        ops.largest, (-(-x.numel() // (block * steps)),), config, {"x": x, "top": top}, {"size": x.numel()}
    )
    return top


def power_above(number: int) -> int:
    """The power of two that is not below a number."""
    return 1 << (number - 1).bit_length()
