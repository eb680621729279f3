"""Quantizes matrices on the device, byte for byte as ``quantport.numerics``: activations at every call, and
weights while they load.
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
from quantport_triton.tuned import tuned_config

FORMATS = ("e4m3fn", "int8", "int4", "e2m1", "e2m3", "e3m2", "nf4", "fp4")
SMALL_FLOATS = ("e4m3fn", "e2m1", "e2m3", "e3m2")
MAX_BLOCK_ELEMENTS = 1 << 15  # a program holds a block in registers


class Quantized(NamedTuple):
    """A quantized matrix ``[m, k]``.

    Attributes:
        codes: Codes of 8 bits ``[m, k]`` in the storage dtype of the format; int4 as of ``pack_int4``, int32
            ``[m, ceil(k / 8)]``; other codes of 4 or 6 bits as of ``pack_bits``, uint8 ``[m, bytes]``.
        scale: Scales as of ``numerics.quantize_blocks``: ``[m, blocks]`` in ``quant.scale_dtype`` (e8m0:
            uint8).
        outer: Outer scales where the quantization has them, fp32: NVFP4 ``[m, 1]``, dual scale
            ``[m, ceil(k / 512)]``.
    """

    codes: Tensor
    scale: Tensor
    outer: Tensor | None = None


def quantize(x: Tensor, quant: Quant, swizzle: bool = False, transposed: bool = False) -> Quantized:
    """Quantizes a matrix.

    Args:
        x: bf16, fp16 or fp32 ``[m, k]``, with any strides.
        quant: A quantization without zero points.
        swizzle: Whether to store the scales as cuBLASLt reads block scales (SWIZZLE_32_4_4), padded with
            zeros to whole tiles: ``[ceil(m / 128) * 128, ceil(blocks / 4) * 4]``.
        transposed: Whether to store the scales column by column: ``[m, blocks]`` with strides ``(1, m)``, as
            ``_scaled_mm`` reads those of 1x128.
    """
    if not has_kernel(quant) or not x.numel() or not compiles_for(target_of(x.device)):
        return _reference(x, quant, swizzle, transposed)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = _empty(x, quant, swizzle, transposed)
    if quant.block_shape[0] == 0:
        _launch_whole(x.contiguous(), quant, out)
    elif quant.block_shape[0] > 1:
        _launch_squares(x, quant, out)
    elif quant.group_size and quant.outer_block != (1, 0):
        _launch_groups(x, quant, out, swizzle)
    else:
        _launch_rows(x, quant, out, swizzle)
    return out._replace(
        scale=_viewed(out.scale, quant.scale_dtype), codes=_viewed(out.codes, _codes_dtype(quant))
    )


def has_kernel(quant: Quant) -> bool:
    """Whether a kernel quantizes so: one level of scales over blocks of any shape, or two levels over groups,
    where the columns of a block fill whole words.
    """
    rows, columns = quant.block_shape
    if (
        quant.format not in FORMATS
        or quant.zero_point
        or quant.scale_quant
        or columns % _codes_per_word(quant)
        or max(rows, 1) * columns > MAX_BLOCK_ELEMENTS
    ):
        return False
    if quant.searched and (quant.rule != "mse" or not _power_of_two(columns)):
        return False
    if quant.scale in ("e8m0", "e4m3fn"):
        return rows == 1 and columns > 0 and quant.format in SMALL_FLOATS and _has_outer_kernel(quant)
    if quant.outer_block is not None or quant.searched:
        return False
    if rows > 1:
        return columns > 0
    return rows == 1 or (columns == 0 and quant.element.bits == 8)


def _has_outer_kernel(quant: Quant) -> bool:
    if quant.outer_block is None:
        return True
    if quant.scale == "e8m0":
        rows, columns = quant.outer_block
        return (
            rows == 1
            and columns % quant.group_size == 0
            and _power_of_two(quant.group_size)
            and _power_of_two(columns)
        )
    return quant.outer_block == (0, 0) or (
        quant.outer_block == (1, 0) and _power_of_two(quant.group_size) and not quant.searched
    )


def _power_of_two(number: int) -> bool:
    return number > 0 and not number & (number - 1)


def _codes_per_word(quant: Quant) -> int:
    """Codes in the smallest word that a group must fill."""
    return 8 if quant.format == "int4" else {8: 1, 6: 4, 4: 2}.get(quant.element.bits, 1)


def _codes_dtype(quant: Quant) -> torch.dtype:
    if quant.element.bits == 8:
        return quant.element.storage
    return torch.int32 if quant.format == "int4" else torch.uint8


def _viewed(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bits as another dtype: kernels store float8 and bf16 as integers."""
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
    """Scales of one byte ``[m, blocks]`` in the layout SWIZZLE_32_4_4, padded with zeros to whole tiles.

    Tiles are 128 x 4, stored as ``[32, 4, 4]``: row ``r`` of a tile is at ``[r % 32, r // 32]``. Source:
    cuBLAS, "1D Block Scaling Factors Layout".
    """
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
    """The tensors of the result, in the dtypes that the kernels write."""
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


class _Arguments(NamedTuple):
    """What the launches for one matrix have in common: arguments of the kernels, and the tuned sizes."""

    tensors: dict[str, Tensor]
    numbers: dict[str, int]
    constants: dict[str, Any]
    sizes: Mapping[str, int]


def _arguments(x: Tensor, quant: Quant, out: Quantized) -> _Arguments:
    (m, k), bits = x.shape, quant.element.bits
    row_bytes = out.codes.shape[1] * out.codes.element_size()
    word = (
        1 if bits == 8 else 3 if bits == 6 else 4 if row_bytes % 4 == 0 and quant.group_size % 8 == 0 else 1
    )
    tensors = {"x": x, "codes": out.codes.view(torch.uint8), "scale": out.scale}
    numbers = {
        "N": m,
        "K": k,
        "stride": x.stride(0),
        "words_per_row": row_bytes // word,
        "groups_per_row": quant.scale_shape(m, k)[1],
    }
    constants = {
        "FORMAT": quant.format,
        "BITS": bits,
        "BYTES": word,
        "WHOLE_WORDS": k % (word * 8 // bits) == 0,
        "SCALE": quant.scale,
        "HALF_RANGE": quant.element.half_range,
    }
    return _Arguments(tensors, numbers, constants, tuned_sizes(x, "search" if quant.searched else "quantize"))


def tuned_sizes(x: Tensor, family: str) -> Mapping[str, int]:
    """The tuned sizes of a family of kernels for a matrix.

    ``TILE_ELEMENTS`` is the size of a tile, of which a warp has ``ELEMENTS_PER_WARP``. Of ``quantize`` there
    are also ``MAX_RESIDENT_ROW``, the longest row that stays in registers, and ``STEPS``, the tiles of a
    program that looks for a maximum.
    """
    return tuned_config(target_of(x.device), family, x.shape[0]).blocks


def tile_config(blocks: dict[str, int], elements: int, per_warp: int) -> Config:
    """The configuration for tiles of ``elements``, without fused multiply-add, which would change bits."""
    return Config(blocks, min(max(elements // per_warp, 1), 16), 1, fusion=False)


def _scale_steps(out: Quantized, swizzle: bool) -> dict[str, int]:
    """``row_step`` and ``group_step`` of ``ops.quantize.store_scales``."""
    return {
        "row_step": out.scale.shape[1] // 4 if swizzle else out.scale.stride(0),
        "group_step": out.scale.stride(1),
    }


def _launch_groups(x: Tensor, quant: Quant, out: Quantized, swizzle: bool) -> None:
    from quantport_triton.ops import quantize as ops

    arguments = _arguments(x, quant, out)
    sizes, padded_group = arguments.sizes, next_power_of_2(quant.group_size)
    outer = 0 if quant.outer_block is None else quant.outer_block[1] or -1
    groups_per_outer = max(outer, quant.group_size) // quant.group_size
    outer_per_row = -(-x.shape[1] // (groups_per_outer * quant.group_size))
    tile_groups = min(
        next_power_of_2(outer_per_row) * groups_per_outer,
        max(sizes["TILE_ELEMENTS"] // padded_group, groups_per_outer),
    )
    tile_rows = min(
        max(sizes["TILE_ELEMENTS"] // (tile_groups * padded_group), 1), next_power_of_2(x.shape[0])
    )
    blocks = {"P": padded_group, "BR": tile_rows, "BG": tile_groups}
    config = tile_config(blocks, tile_rows * tile_groups * padded_group, sizes["ELEMENTS_PER_WARP"])
    tensors = {**arguments.tensors, "outer": out.outer if out.outer is not None else out.scale}
    tensors["top"] = _largest_magnitude(x.contiguous()) if outer == -1 else arguments.tensors["codes"]
    grid = -(-x.shape[0] // tile_rows) * -(-arguments.numbers["groups_per_row"] // tile_groups)
    constants = {
        "ROUNDING": _exponent_rounding(quant),
        "EMAX": math.frexp(quant.element.high)[1] - 1,
        "GROUP": quant.group_size,
        "OUTER": outer,
        "GROUP_LOG2": padded_group.bit_length() - 1,
        "OUTER_LOG2": max(outer, 1).bit_length() - 1,
        "SEARCH": quant.searched,
        "SWIZZLE": swizzle,
    }
    numbers = {**arguments.numbers, **_scale_steps(out, swizzle)}
    launch(ops.groups, (grid,), config, tensors, numbers, **arguments.constants, **constants)


def _exponent_rounding(quant: Quant) -> int:
    """What a rule of e8m0 scales adds to the bits of the largest magnitude before it takes the exponent; -1
    for ``rceil``.
    """
    mantissa = quant.element.mantissa
    addends = {"even": 1 << (22 - mantissa), "even1": 1 << 21, "ceil": (1 << 23) - 1, "rceil": -1}
    return addends.get(quant.rule, 0)


def _launch_rows(x: Tensor, quant: Quant, out: Quantized, swizzle: bool) -> None:
    from quantport_triton.ops import quantize as ops

    arguments = _arguments(x, quant, out)
    block = max(min(next_power_of_2(x.shape[1]), arguments.sizes["MAX_RESIDENT_ROW"]), quant.group_size, 8)
    padded_group = quant.group_size or block
    blocks = {"BG": block // padded_group, "P": padded_group}
    config = tile_config(blocks, block, arguments.sizes["ELEMENTS_PER_WARP"])
    tensors = {**arguments.tensors, "outer": out.outer if out.outer is not None else out.scale}
    numbers = {**arguments.numbers, **_scale_steps(out, swizzle)}
    constants = {"GROUP": quant.group_size, "SWIZZLE": swizzle, "READ_ONCE": block >= x.shape[1]}
    launch(ops.rows, (x.shape[0],), config, tensors, numbers, **arguments.constants, **constants)


def _launch_squares(x: Tensor, quant: Quant, out: Quantized) -> None:
    from quantport_triton.ops import quantize_blocks as ops

    tensors, numbers, constants, sizes = _arguments(x, quant, out)
    rows, columns = quant.block_shape
    padded_rows, padded_columns = next_power_of_2(rows), next_power_of_2(columns)
    blocks = {"BR": padded_rows, "P": padded_columns}
    config = tile_config(blocks, padded_rows * padded_columns, sizes["ELEMENTS_PER_WARP"])
    grid = -(-x.shape[0] // rows) * numbers["groups_per_row"]
    launch(ops.squares, (grid,), config, tensors, numbers, **constants, ROWS=rows, GROUP=columns)


def _launch_whole(x: Tensor, quant: Quant, out: Quantized) -> None:
    from quantport_triton.ops import quantize_blocks as ops

    arguments = _arguments(x, quant, out)
    block = arguments.sizes["TILE_ELEMENTS"]
    tensors = {**arguments.tensors, "top": _largest_magnitude(x)}
    constants = {key: arguments.constants[key] for key in ("FORMAT", "SCALE", "HALF_RANGE")}
    config = tile_config({"BLOCK": block}, block, arguments.sizes["ELEMENTS_PER_WARP"])
    launch(ops.whole, (-(-x.numel() // block),), config, tensors, {"size": x.numel()}, **constants)


def _largest_magnitude(x: Tensor) -> Tensor:
    """Bits of the largest magnitude of a contiguous matrix: int32 ``[1]``."""
    from quantport_triton.ops import quantize_blocks as ops

    top, sizes = x.new_zeros(1, dtype=torch.int32), tuned_sizes(x, "quantize")
    block, steps = sizes["TILE_ELEMENTS"], sizes["STEPS"]
    config = tile_config({"BLOCK": block, "STEPS": steps}, block, sizes["ELEMENTS_PER_WARP"])
    grid = -(-x.numel() // (block * steps))
    launch(ops.largest, (grid,), config, {"x": x, "top": top}, {"size": x.numel()})
    return top


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
