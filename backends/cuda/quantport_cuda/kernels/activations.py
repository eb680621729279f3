"""Activations as the matrix multiplications of torch want them: codes, and scales in the layout of cuBLASLt."""

from __future__ import annotations

import torch
from torch import Tensor

from quantport.backend import Quant, numerics
from quantport_triton import available
from quantport_triton.quantize import Quantized, quantize, swizzled


def quantized(x: Tensor, quant: Quant, swizzle: bool = False, transposed: bool = False) -> Quantized:
    """Quantizes activations ``[m, k]`` in one launch, to the bits of ``numerics.quantize_blocks``; by that where Triton is missing.

    Args:
        x: bf16, fp16 or fp32.
        quant: Element format, block shape and scale rule.
        swizzle: Scales in the order of ``swizzled``.
        transposed: Scales column by column: strides ``(1, m)``.
    """
    if not available():
        layout = {name: True for name, asked in (("swizzle", swizzle), ("transposed", transposed)) if asked}
        return quantize(x, quant, **layout)
    blocks = numerics.quantize_blocks(x, quant)
    codes = blocks.codes if quant.element.bits == 8 else numerics.pack_bits(blocks.codes, quant.element.bits)
    scale = swizzled(blocks.scale) if swizzle else blocks.scale.t().contiguous().t() if transposed else blocks.scale
    return Quantized(codes, scale, blocks.outer)


def unswizzled(flat: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of ``quantport_triton.quantize.swizzled``, flat or not: uint8 ``[rows, columns]``."""
    tiles = flat.view(-(-rows // 128), -(-columns // 4), 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-(-rows // 128) * 128, -(-columns // 4) * 4)[:rows, :columns].contiguous()
