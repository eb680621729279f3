"""Double quantization: the scales of a code-book format, themselves quantized to 8 bits.

``offset`` is the middle of all scales of the weight; the scales of a row, less the offset, share one fp32
scale (their largest magnitude) and are stored as indices into the dynamic 8-bit code. Codes are computed with
the scales as stored. QLoRA (arXiv 2305.14314) takes the mean as the offset and 256 scales at a time in memory
order; the middle and rows are used here because they do not depend on how a weight is sharded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantport.numerics.blocks import Reduce, block_amax, quantize_blocks
from quantport.numerics.codebooks import codebook, lookup, nearest
from quantport.numerics.scales import EPS, scale_of
from quantport.scheme import Quant


def quantize_double(
    weight: Tensor, quant: Quant, reduce: Reduce | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Quantizes a weight ``[n, k]`` and its scales.

    Returns:
        Codes uint8 ``[n, k]``, and ``weight_scale`` uint8 ``[n, groups]`` (indices), ``weight_scale_scale``
        fp32 ``[n, 1]`` and ``weight_scale_offset`` fp32 ``[1]``.
    """
    n, k = weight.shape
    if not weight.numel():
        index = torch.empty(quant.scale_shape(n, k), dtype=torch.uint8, device=weight.device)
        one = {"weight_scale_scale": torch.ones(n, 1, dtype=torch.float32, device=weight.device)}
        return quantize_blocks(weight, quant).codes, {
            "weight_scale": index,
            **one,
            "weight_scale_offset": torch.zeros(1, dtype=torch.float32, device=weight.device),
        }
    scale = scale_of(block_amax(weight, quant.block_shape[0], quant.group_size), quant)
    extra = quantize_scales(scale, reduce)
    return quantize_blocks(weight, quant, dequantize_scales(extra)).codes, extra


def quantize_scales(scale: Tensor, reduce: Reduce | None = None) -> dict[str, Tensor]:
    """Quantizes scales fp32 ``[n, groups]`` to what ``quantize_double`` returns beside the codes."""
    high, low = scale.amax().view(1, 1), -scale.amin().view(1, 1)
    if reduce:
        high, low = reduce(high, 0, 0), reduce(low, 0, 0)
    offset = (high / 2 - low / 2).view(1)
    rest = scale - offset
    row = rest.abs().amax(1, keepdim=True)
    row = reduce(row, 1, 0) if reduce else row
    row = torch.where(row == 0, EPS, row)
    return {
        "weight_scale": nearest(rest / row, "dynamic8"),
        "weight_scale_scale": row,
        "weight_scale_offset": offset,
    }


def dequantize_scales(stored: dict[str, Tensor]) -> Tensor:
    """The fp32 scales ``[n, groups]`` that double quantization stands for; never 0."""
    table = codebook("dynamic8", stored["weight_scale"].device)
    scale = (
        lookup(table, stored["weight_scale"]) * stored["weight_scale_scale"] + stored["weight_scale_offset"]
    )
    return torch.where(scale == 0, EPS, scale)
