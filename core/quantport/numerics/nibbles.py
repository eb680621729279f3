"""int4 packing: eight codes to an int32 word, low nibble first, code + 8 (compressed-tensors ``pack-quantized``)."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(codes: Tensor) -> Tensor:
    """Packs int8 codes in [-8, 7].

    Args:
        codes: int8 ``[n, k]``.

    Returns:
        int32 ``[n, ceil(k/8)]``; nibble i of word j holds ``code[8j+i] + 8``. Nibbles past k are zero.
    """
    k = codes.shape[1]
    nibbles = codes.contiguous().add(8).view(torch.uint8)
    if not codes.numel():
        return torch.empty(codes.shape[0], -(-k // 8), dtype=torch.int32, device=codes.device)
    if k % 8:
        nibbles = torch.nn.functional.pad(nibbles, (0, -k % 8))
    pairs = nibbles.view(torch.int16)  # little-endian: first code in the low byte
    return (pairs | pairs >> 4).to(torch.uint8).view(torch.int32)


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """The inverse of ``pack_int4``: int32 ``[n, ceil(k/8)]`` to int8 codes ``[n, k]``."""
    nibbles = packed.contiguous().view(torch.uint8)
    codes = torch.stack((nibbles & 15, nibbles >> 4), dim=-1).flatten(-2)
    return codes[..., :k].view(torch.int8).sub(8).contiguous()
