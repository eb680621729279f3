"""Packing of codes that are smaller than a byte, low bits first."""

from __future__ import annotations

import torch
from torch import Tensor

from quantport.scheme.scheme import packed_bytes


def pack_int4(codes: Tensor) -> Tensor:
    """Packs int8 codes in [-8, 7], eight to a word, each as code + 8 (compressed-tensors ``pack-quantized``).

    Args:
        codes: int8 ``[n, k]``.

    Returns:
        int32 ``[n, ceil(k/8)]``; nibble i of word j holds ``code[8j+i] + 8``. Nibbles past k are zero.
    """
    k = codes.shape[1]
    if not codes.numel():
        return torch.empty(codes.shape[0], -(-k // 8), dtype=torch.int32, device=codes.device)
    nibbles = codes.contiguous().add(8).view(torch.uint8)
    if k % 8:
        nibbles = torch.nn.functional.pad(nibbles, (0, -k % 8))
    return _pairs(nibbles).view(torch.int32)


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """The inverse of ``pack_int4``: int32 ``[n, ceil(k/8)]`` to int8 codes ``[n, k]``."""
    return unpack_bits(packed.contiguous().view(torch.uint8), k, 4).view(torch.int8).sub(8)


def computes_here(tensor: Tensor) -> bool:
    """Whether operations on a tensor run now and on the CPU, where several narrow ones may be faster than the
    one that says what is meant, and which a compiler or an accelerator makes one of.
    """
    return tensor.is_cpu and not torch.compiler.is_compiling()


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs codes of 4 or 6 bits densely, the first code in the lowest bits (as MX and NVFP4 files have
    them).

    Args:
        codes: uint8 ``[n, k]``.
        bits: 4 (two codes to a byte) or 6 (four codes to three bytes).

    Returns:
        uint8 ``[n, ceil(k/2)]``, or ``[n, 3 ceil(k/4)]``. Codes past k are zero.
    """
    n, k = codes.shape
    if not codes.numel():
        return torch.empty(n, packed_bytes(k, bits), dtype=torch.uint8, device=codes.device)
    group = 2 if bits == 4 else 4
    if k % group:
        codes = torch.nn.functional.pad(codes, (0, -k % group))
    if bits == 4:
        return _pairs(codes.contiguous())
    a, b, c, d = codes.view(n, -1, 4).unbind(-1)
    return torch.stack((a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2), -1).view(n, -1)


def unpack_bits(packed: Tensor, k: int, bits: int) -> Tensor:
    """The inverse of ``pack_bits``: uint8 codes ``[n, k]``."""
    if bits == 4 and computes_here(packed):
        codes = packed.to(torch.int16)  # a byte, and itself four bits higher: little-endian again
        codes = codes.bitwise_or_(codes << 4).bitwise_and_(0x0F0F).view(torch.uint8)
    elif bits == 4:
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    else:
        a, b, c = packed.view(packed.shape[0], packed.shape[1] // 3, 3).unbind(-1)
        codes = torch.stack((a & 63, a >> 6 | (b & 15) << 2, b >> 4 | (c & 3) << 4, c >> 2), -1).flatten(-2)
    return codes[..., :k].contiguous()


def _pairs(nibbles: Tensor) -> Tensor:
    """Two codes of 4 bits to a byte: the first one low."""
    pairs = nibbles.view(torch.int16)  # little-endian: first code in the low byte
    return (pairs | pairs >> 4).to(torch.uint8)
