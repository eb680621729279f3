"""Weights at load: the stored tensors of a scheme, equal to ``numerics.quantize_weight`` byte for byte."""

from __future__ import annotations

import torch
from torch import Tensor

from quantport.backend import Quant, Scheme
from quantport_triton import compiles_for
from quantport_triton.launch import launch, target_of
from quantport_triton.quantize import cut_of, power_above, quantize, serves, tuned


def quantize_weight(weight: Tensor, scheme: Scheme) -> dict[str, Tensor] | None:
    """Quantizes one weight on its device.

    Args:
        weight: bf16, fp16 or fp32 ``[n, k]``; of a rotated scheme, rotated already.
        scheme: The scheme.

    Returns:
        The tensors of ``scheme.layout(n, k)``, or None for what has no kernel: an empty weight, GGUF,
        ``hqq``, a solver of the scheme's own, quantized scales (``:double``), groups that are not whole
        words, and an architecture that this Triton is too old for. Scales are NaN or Inf exactly where the
        weight holds a NaN or an Inf; the codes there mean nothing.
    """
    quant = scheme.weight
    if scheme.solver is not None or not weight.numel() or not compiles_for(target_of(weight.device)):
        return None
    if quant.zero_point:
        return _with_offsets(weight, quant)
    if not serves(quant):
        return None
    codes, scale, outer = quantize(weight, quant)
    stored = (
        [codes, scale]
        if outer is None
        else [codes, scale, outer.view(1) if quant.outer_block == (0, 0) else outer]
    )
    return dict(zip(scheme.layout(*weight.shape), stored, strict=True))


def _with_offsets(weight: Tensor, quant: Quant) -> dict[str, Tensor] | None:
    """int4 in groups with offsets, by least squares."""
    from quantport_triton.ops import quantize as ops

    (n, k), group = weight.shape, quant.group_size
    if quant != Quant("int4", (1, group), "bf16", "mse", zero_point=True) or group < 8 or group & (group - 1):
        return None
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    words, blocks = -(-k // 8), -(-k // group)
    codes = weight.new_empty(n, words, dtype=torch.int32)
    scale, zero = (
        weight.new_empty(n, blocks, dtype=torch.int16),
        weight.new_empty(n, blocks, dtype=torch.int16),
    )
    cut = tuned(weight, "search")
    across = min(power_above(blocks), max(cut["TILE"] // group, 1))
    down = min(max(cut["TILE"] // (across * group), 1), power_above(n))
    config = cut_of({"BR": down, "BG": across}, down * across * group, cut["PER_WARP"])
    tensors = {"x": weight, "codes": codes.view(torch.uint8), "scale": scale, "zero": zero}
    numbers = {"N": n, "K": k, "stride": weight.stride(0), "words_per_row": words, "groups_per_row": blocks}
    constants = {"BYTES": 4, "WHOLE_WORDS": k % 8 == 0, "GROUP": group, "GROUP_LOG2": group.bit_length() - 1}
    launch(ops.offsets, (-(-n // down) * -(-blocks // across),), config, tensors, numbers, **constants)
    return {
        "weight_packed": codes,
        "weight_scale": scale.view(torch.bfloat16),
        "weight_zero": zero.view(torch.bfloat16),
    }
