"""Quantizes weights while they load, byte for byte as ``numerics.quantize_weight``."""

from __future__ import annotations

import torch
from torch import Tensor

from quantport.backend import Quant, Scheme
from quantport_triton import compiles_for
from quantport_triton.launch import launch, target_of
from quantport_triton.quantize import has_kernel, next_power_of_2, quantize, tile_config, tuned_sizes


def quantize_weight(weight: Tensor, scheme: Scheme) -> dict[str, Tensor] | None:
    """Quantizes one weight on its device.

    Args:
        weight: bf16, fp16 or fp32 ``[n, k]``, already rotated if the scheme rotates.
        scheme: The scheme.

    Returns:
        The tensors of ``scheme.layout(n, k)``. None where there is no kernel: for an empty weight, GGUF,
        ``hqq``, a solver of the scheme's own, quantized scales (``:double``), groups that are not whole
        words, and an architecture that this Triton is too old for. A scale is NaN or Inf exactly where its
        block holds a NaN or an Inf; the codes of that block mean nothing.
    """
    quant = scheme.weight
    if scheme.solver is not None or not weight.numel() or not compiles_for(target_of(weight.device)):
        return None
    if quant.zero_point:
        return _quantize_with_offsets(weight, quant)
    if not has_kernel(quant):
        return None
    codes, scale, outer = quantize(weight, quant)
    stored = [codes, scale]
    if outer is not None:
        stored.append(outer.view(1) if quant.outer_block == (0, 0) else outer)
    return dict(zip(scheme.layout(*weight.shape), stored, strict=True))


def _quantize_with_offsets(weight: Tensor, quant: Quant) -> dict[str, Tensor] | None:
    """Quantizes to int4 in groups with offsets, by least squares; None for any other quantization."""
    from quantport_triton.ops import quantize as ops

    (n, k), group = weight.shape, quant.group_size
    if quant != Quant("int4", (1, group), "bf16", "mse", zero_point=True) or group < 8 or group & (group - 1):
        return None
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    words, groups = -(-k // 8), -(-k // group)
    codes = weight.new_empty(n, words, dtype=torch.int32)
    scale, zero = (weight.new_empty(n, groups, dtype=torch.int16) for _ in range(2))
    sizes = tuned_sizes(weight, "search")
    tile_groups = min(next_power_of_2(groups), max(sizes["TILE_ELEMENTS"] // group, 1))
    tile_rows = min(max(sizes["TILE_ELEMENTS"] // (tile_groups * group), 1), next_power_of_2(n))
    blocks = {"BR": tile_rows, "BG": tile_groups}
    config = tile_config(blocks, tile_rows * tile_groups * group, sizes["ELEMENTS_PER_WARP"])
    tensors = {"x": weight, "codes": codes.view(torch.uint8), "scale": scale, "zero": zero}
    numbers = {"N": n, "K": k, "stride": weight.stride(0), "words_per_row": words, "groups_per_row": groups}
    constants = {"BYTES": 4, "WHOLE_WORDS": k % 8 == 0, "GROUP": group, "GROUP_LOG2": group.bit_length() - 1}
    grid = -(-n // tile_rows) * -(-groups // tile_groups)
    launch(ops.offsets, (grid,), config, tensors, numbers, **constants)
    return {
        "weight_packed": codes,
        "weight_scale": scale.view(torch.bfloat16),
        "weight_zero": zero.view(torch.bfloat16),
    }
