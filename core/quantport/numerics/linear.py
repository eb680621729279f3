"""Reference weights and the reference linear layer of every scheme."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantport.errors import WeightError
from quantport.formats import BF16
from quantport.numerics.blocks import check_finite, dequantize, quantize
from quantport.numerics.nibbles import pack_int4, unpack_int4
from quantport.scheme import Scheme

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
Fast = Callable[[Tensor, Scheme], dict[str, Tensor] | None]


def quantize_weight(
    weight: Tensor, scheme: Scheme, name: str = "weight", nonfinite: str = "error", fast: Fast | None = None
) -> dict[str, Tensor]:
    """Quantizes one weight to the stored layout of its scheme.

    Args:
        weight: ``[n, k]``, bf16, fp16 or fp32, on any device.
        scheme: The scheme.
        name: For the error text.
        nonfinite: ``error`` refuses NaN and Inf; ``zero`` reads each of them as 0.
        fast: A backend's ``quantize_weight``: equal to this, and may decline with None.

    Returns:
        The tensors of ``scheme.layout(n, k)``.

    Raises:
        WeightError: wrong rank or dtype, or a NaN or Inf while ``nonfinite="error"``.
    """
    if weight.dim() != 2 or weight.dtype not in FLOATS:
        raise WeightError(
            f"quantize {name} to {scheme.name}",
            f"shape {list(weight.shape)}, dtype {weight.dtype}",
            "a matrix [out, in] in bfloat16, float16 or float32",
        )
    if scheme.weight.element is BF16:
        return {"weight": weight.to(torch.bfloat16, copy=True)}
    stored = (fast and fast(weight, scheme)) or _stored(weight, scheme)
    if nonfinite == "zero" and not torch.isfinite(stored["weight_scale"]).all():
        stored = _stored(torch.nan_to_num(weight, nan=0.0, posinf=0.0, neginf=0.0), scheme)
    check_finite(stored["weight_scale"], name)
    return stored


def _stored(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    codes, scale = quantize(weight, scheme.weight)
    if scheme.weight.element.bits == 4:
        return {"weight_packed": pack_int4(codes), "weight_scale": scale}
    return {"weight": codes, "weight_scale": scale}


def dequantize_weight(stored: dict[str, Tensor], scheme: Scheme, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turns stored tensors back into values ``[n, k]``, rounded once to ``dtype``."""
    if scheme.weight.element is BF16:
        return stored["weight"].to(dtype)
    codes = unpack_int4(stored["weight_packed"], k) if "weight_packed" in stored else stored["weight"]
    return dequantize(codes, stored["weight_scale"], scheme.weight, dtype)


def linear(x: Tensor, stored: dict[str, Tensor], scheme: Scheme, bias: Tensor | None = None) -> Tensor:
    """The reference of every kernel: quantize the activations as the scheme says, multiply in fp32, round once.

    Args:
        x: ``[M, K]``.
        stored: The tensors of ``scheme.layout(N, K)``.
        scheme: The scheme; without activation quantization the activations are used as they are.
        bias: ``[N]`` or None, added in fp32.

    Returns:
        ``[M, N]`` in the dtype of ``x``.
    """
    weight = dequantize_weight(stored, scheme, x.shape[1])
    values = dequantize(*quantize(x, scheme.activation), scheme.activation) if scheme.activation else x.float()
    return torch.nn.functional.linear(values, weight, None if bias is None else bias.float()).to(x.dtype)
