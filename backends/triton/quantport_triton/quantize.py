"""Quantization on the device: activations at every call, weights at load. Equal to ``quantport.numerics`` byte for byte."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from quantport.backend import Quant, numerics


class Quantized(NamedTuple):
    """A quantized matrix ``[m, k]``.

    Attributes:
        codes: 8-bit codes ``[m, k]`` (float8 as float8), or packed codes of 4 or 6 bits, uint8 ``[m, bytes]`` (``pack_bits``).
        scale: Scales as ``numerics.quantize_blocks`` stores them: ``[m, blocks]`` of ``quant.scale_dtype`` (e8m0: uint8).
        outer: Outer scales, fp32, where the Quant has them: nvfp4 ``[m, 1]``, dual scale ``[m, ceil(k / 512)]``.
    """

    codes: Tensor
    scale: Tensor
    outer: Tensor | None = None


def quantize(x: Tensor, quant: Quant) -> Quantized:
    """Quantizes activations ``[m, k]``, bf16, fp16 or fp32."""
    blocks = numerics.quantize_blocks(x, quant)
    codes = blocks.codes if quant.element.bits == 8 else numerics.pack_bits(blocks.codes, quant.element.bits)
    return Quantized(codes, blocks.scale, blocks.outer)
