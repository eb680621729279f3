"""Weights at load: the stored tensors of a scheme, equal to ``numerics.quantize_weight`` byte for byte."""

from __future__ import annotations

from torch import Tensor

from quantport.backend import Scheme
from quantport_triton.quantize import quantize, serves


def quantize_weight(weight: Tensor, scheme: Scheme) -> dict[str, Tensor] | None:
    """Quantizes one weight on its device.

    Args:
        weight: bf16, fp16 or fp32 ``[n, k]``; of a rotated scheme, rotated already.
        scheme: The scheme.

    Returns:
        The tensors of ``scheme.layout(n, k)``, or None for what has no kernel: an empty weight, GGUF, ``hqq``, quantized scales
        (``:double``), and groups that are not whole words. Scales are NaN or Inf exactly where the weight holds a NaN or an Inf;
        the codes there mean nothing.
    """
    quant = scheme.weight
    if not weight.numel() or not serves(quant):
        return None
    codes, scale, outer = quantize(weight, quant)
    stored = [codes, scale] if outer is None else [codes, scale, outer.view(1) if quant.outer == (0, 0) else outer]
    return dict(zip(scheme.layout(*weight.shape), stored, strict=True))
