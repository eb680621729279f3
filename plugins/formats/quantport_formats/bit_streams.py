"""Codes of 1 to 8 bits, packed without gaps into words of 32 bits, low bits first.

Source: compressed-tensors 0.20, ``compressors/pack_quantized/helpers.py``: 32 codes fill as many words as
they have bits, and a code may lie in two words.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpacks the codes of each row.

    Args:
        words: int32 ``[rows, words]``.
        bits: Bits of a code, 1 to 8.
        count: Codes of a row, at most ``32 * words / bits``.

    Returns:
        uint8 ``[rows, count]``.
    """
    stream = words.contiguous().view(torch.uint8)  # little-endian
    if bits == 8:
        return stream[:, :count].contiguous()
    if bits == 4:
        return torch.stack((stream & 15, stream >> 4), -1).flatten(1)[:, :count].contiguous()
    first = torch.arange(count, dtype=torch.int64, device=words.device) * bits
    at, shift = first // 8, (first % 8).to(torch.int32)
    wide = torch.nn.functional.pad(stream, (0, 1)).to(torch.int32)
    pairs = wide[:, at] | wide[:, at + 1] << 8
    return (pairs >> shift & (1 << bits) - 1).to(torch.uint8)


def words_for(count: int, bits: int) -> int:
    """Words that so many codes take."""
    return -(-count * bits // 32)
