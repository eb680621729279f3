"""Checkpoints in the manner of GPTQ and AWQ, made by hand: one bit at a time, with Python's integers."""

from __future__ import annotations

import torch
from torch import Tensor


def words(codes: Tensor, bits: int) -> Tensor:
    """Packs the columns of codes as one stream of bits each: ``[k, n]`` to int32 ``[k * bits / 32, n]``."""
    rows, columns = codes.shape
    out = torch.zeros(rows * bits // 32, columns, dtype=torch.int64)
    for place in range(rows * bits):
        bit = codes[place // bits].long() >> (place % bits) & 1
        out[place // 32] |= bit << place % 32
    return torch.where(out >= 1 << 31, out - (1 << 32), out).to(torch.int32)


def quantized(
    weight: Tensor, bits: int, group: int, symmetric: bool, order: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes ``[n, k]``, zero points and fp16 scales ``[n, groups]``, the group of each input, and the values.

    Args:
        weight: ``[n, k]``.
        bits: Of a code.
        group: Inputs of a group; -1 for all.
        symmetric: Zero points in the middle.
        order: The inputs in the order in which they are grouped.
    """
    n, k = weight.shape
    size, most = (k if group == -1 else group), (1 << bits) - 1
    of = torch.empty(k, dtype=torch.long)
    of[torch.arange(k) if order is None else order] = torch.arange(k) // size
    count = int(of.max()) + 1
    scales, zeros = torch.empty(n, count), torch.empty(n, count, dtype=torch.long)
    for g in range(count):
        part = weight[:, of == g].float()
        if symmetric:
            scales[:, g], zeros[:, g] = part.abs().amax(1) * 2 / most, (most + 1) // 2
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales[:, g] = (high - low) / most
            zeros[:, g] = (-low / scales[:, g]).round().clamp(0, most).long()
    scales = scales.half()
    spread, shift = scales[:, of].float(), zeros[:, of]
    codes = ((weight.float() / spread).round().long() + shift).clamp(0, most)
    return codes, zeros, scales, of, (codes - shift).float() * spread
