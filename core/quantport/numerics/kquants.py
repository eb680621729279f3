"""The K block types of GGUF: 256 elements in sub-blocks, whose scales are quantized once more.

Layouts: ggml ``ggml-common.h`` (``block_q2_K`` to ``block_q6_K``, ``block_q8_K``). Sub-block
scales and offsets come from a search for least squared error; codes are computed last, with every scale as
stored. q8_k is for activations: one scale, and the rounding of ggml's ``quantize_row_q8_K_ref``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantport.numerics.scales import over
from quantport.numerics.search import fold, least_squares_grid

FACTORS = (
    1.0,
    0.95,
    0.9,
    0.85,
    0.8,
    1.05,
)  # tried scales without offsets, relative to the extreme of a sub-block


def half_bytes(x: Tensor) -> Tensor:
    """fp32 ``[r, 1]`` rounded to fp16, as bytes ``[r, 2]``."""
    return x.half().view(torch.uint8)


def halves(blocks: Tensor) -> Tensor:
    """Bytes ``[r, 2c]`` read as fp16: fp32 ``[r, c]``."""
    return blocks.contiguous().view(torch.float16).float()


def _divide(x: Tensor, by: Tensor) -> Tensor:
    """x / by, and 0 where by is 0."""
    return torch.where(by == 0, 0.0, x / by)


def _sub_blocks(x: Tensor, top: int, size: int = 32, most: int = 63) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes 0..top of ``[r, 256]`` in sub-blocks; scales and offsets 0..most of each; fp16 d, dmin
    ``[r, 2]``.
    """
    parts = x.view(-1, 256 // size, size)
    scale, zero = least_squares_grid(parts, parts.amin(-1).clamp_max(0), parts.amax(-1), top)
    least = (-zero).clamp_min(0) + 0.0  # + 0.0: no negative zero, whose sign would be stored
    scale = scale.clamp_min(0) + 0.0
    d = over(torch.cat((scale.amax(1, keepdim=True), least.amax(1, keepdim=True)), 1), most)
    d = torch.where(torch.isfinite(x).all(1, keepdim=True), d, torch.nan).half()
    d = torch.where(d[:, :1] == 0, 0.0, d)  # scales too small for fp16: zeros, not offsets alone
    sc = _divide(scale, d[:, :1].float()).round_().clamp_(0, most)
    m = _divide(least, d[:, 1:].float()).round_().clamp_(0, most)
    step, low = (d[:, :1].float() * sc).unsqueeze(-1), (d[:, 1:].float() * m).unsqueeze(-1)
    q = _divide(parts + low, step).round_().clamp_(0, top)
    return q.to(torch.uint8), sc.to(torch.uint8), m.to(torch.uint8), d


def _pack_scales(sc: Tensor, m: Tensor) -> Tensor:
    """Eight 6-bit scales and offsets in 12 bytes: 0 to 3 whole, 4 to 7 split into four low and two
    high bits.
    """
    low = sc[:, :4] | (sc[:, 4:] >> 4) << 6
    middle = m[:, :4] | (m[:, 4:] >> 4) << 6
    return torch.cat((low, middle, (sc[:, 4:] & 15) | (m[:, 4:] & 15) << 4), 1)


def _unpack_scales(s: Tensor) -> tuple[Tensor, Tensor]:
    a, b, c = s.split(4, 1)
    return torch.cat((a & 63, (c & 15) | (a >> 6) << 4), 1), torch.cat((b & 63, c >> 4 | (b >> 6) << 4), 1)


def _pack_nibbles(q: Tensor) -> Tensor:
    """Low nibbles of codes ``[r, 8, 32]``: of each pair of sub-blocks the first low, the second high."""
    q = (q & 15).view(-1, 4, 2, 32)
    return (q[:, :, 0] | q[:, :, 1] << 4).view(-1, 128)


def _unpack_nibbles(b: Tensor) -> Tensor:
    b = b.view(-1, 4, 1, 32)
    return torch.cat((b & 15, b >> 4), 2).view(-1, 8, 32)


def _with_offsets(q: Tensor, blocks: Tensor) -> Tensor:
    """Values of codes ``[r, 8, 32]`` whose block begins with d, dmin and packed scales."""
    sc, m = _unpack_scales(blocks[:, 4:16])
    d = blocks[:, :4].contiguous().view(torch.float16).float()
    step, low = (d[:, :1] * sc).unsqueeze(-1), (d[:, 1:] * m).unsqueeze(-1)
    return (q.float() * step - low).view(-1, 256)


def _pack_pairs(q: Tensor) -> Tensor:
    """Low two bits of 256 codes: of each half four runs of 32, the first lowest, in 32 bytes."""
    q = (q & 3).view(-1, 2, 4, 32)
    return (q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6).view(-1, 64)


def _unpack_pairs(b: Tensor) -> Tensor:
    b = b.reshape(-1, 2, 1, 32)
    return torch.cat((b & 3, b >> 2 & 3, b >> 4 & 3, b >> 6), 2).view(-1, 16, 16)


def quantize_q2_k(x: Tensor) -> Tensor:
    """``[r, 256]`` to ``[r, 84]``: 16 bytes of scales (low) and offsets (high), 64 of codes, d, dmin."""
    q, sc, m, d = _sub_blocks(x, 3, 16, 15)
    return torch.cat((sc | m << 4, _pack_pairs(q), d.view(torch.uint8)), 1)


def dequantize_q2_k(blocks: Tensor) -> Tensor:
    """The inverse: ``[r, 84]`` to fp32 ``[r, 256]``."""
    d, both = halves(blocks[:, 80:]), blocks[:, :16]
    step, low = (d[:, :1] * (both & 15)).unsqueeze(-1), (d[:, 1:] * (both >> 4)).unsqueeze(-1)
    return (step * _unpack_pairs(blocks[:, 16:80]).float() - low).view(-1, 256)


def quantize_q3_k(x: Tensor) -> Tensor:
    """``[r, 256]`` to ``[r, 110]``: 32 bytes of third bits, bit i of each: run i of 32; 64 bytes of low bits;
    12 bytes of 6-bit scales of 16 sub-blocks of 16; d.
    """
    q, sc, d = _signed_sub_blocks(x, 4, 32)
    q, sc = (q + 4).to(torch.uint8).view(-1, 8, 32), (sc + 32).to(torch.uint8)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=x.device)
    high = ((q >> 2) * weights.unsqueeze(1)).sum(1, dtype=torch.uint8)
    low = sc[:, :8] & 15 | sc[:, 8:] << 4
    top = (sc >> 4).view(-1, 4, 4)
    top = top[:, 0] | top[:, 1] << 2 | top[:, 2] << 4 | top[:, 3] << 6
    return torch.cat((high, _pack_pairs(q), low, top, d.view(torch.uint8)), 1)


def dequantize_q3_k(blocks: Tensor) -> Tensor:
    """The inverse: ``[r, 110]`` to fp32 ``[r, 256]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device).unsqueeze(1)
    high = (blocks[:, :32].unsqueeze(1) >> shifts & 1).view(-1, 16, 16)
    q = (_unpack_pairs(blocks[:, 32:96]) | high << 2).float() - 4
    low, top = blocks[:, 96:104], blocks[:, 104:108]
    sc = torch.cat((low & 15, low >> 4), 1)
    sc = sc | torch.cat((top & 3, top >> 2 & 3, top >> 4 & 3, top >> 6), 1) << 4
    return (q * (halves(blocks[:, 108:]) * (sc.float() - 32)).unsqueeze(-1)).view(-1, 256)


def quantize_q4_k(x: Tensor) -> Tensor:
    """``[r, 256]`` to ``[r, 144]``: d, dmin, 12 bytes of scales, 128 bytes of nibbles."""
    q, sc, m, d = _sub_blocks(x, 15)
    return torch.cat((d.view(torch.uint8), _pack_scales(sc, m), _pack_nibbles(q)), 1)


def dequantize_q4_k(blocks: Tensor) -> Tensor:
    """The inverse: ``[r, 144]`` to fp32 ``[r, 256]``."""
    return _with_offsets(_unpack_nibbles(blocks[:, 16:]), blocks)


def quantize_q5_k(x: Tensor) -> Tensor:
    """``[r, 256]`` to ``[r, 176]``: as q4_k, with 32 bytes of fifth bits before the nibbles; bit i of each:
    sub-block i.
    """
    q, sc, m, d = _sub_blocks(x, 31)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=x.device)
    high = ((q >> 4) * weights.unsqueeze(1)).sum(1, dtype=torch.uint8)
    return torch.cat((d.view(torch.uint8), _pack_scales(sc, m), high, _pack_nibbles(q)), 1)


def dequantize_q5_k(blocks: Tensor) -> Tensor:
    """The inverse: ``[r, 176]`` to fp32 ``[r, 256]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device).unsqueeze(1)
    high = blocks[:, 16:48].unsqueeze(1) >> shifts & 1
    return _with_offsets(_unpack_nibbles(blocks[:, 48:]) | high << 4, blocks)


def _signed_sub_blocks(x: Tensor, top: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes -top..top - 1 of ``[r, 256]`` in sub-blocks of 16; scales -most..most - 1 ``[r, 16]``; d."""
    parts = x.view(-1, 16, 16)
    extreme = parts.gather(2, parts.abs().argmax(2, keepdim=True))
    best, scale = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for factor in FACTORS:
        q = _divide(parts, extreme * factor / -top).round_().clamp_(-top, top - 1)
        qx, qq = fold(q * parts).unsqueeze(-1), fold(q * q).unsqueeze(-1)
        explained = _divide(qx * qx, qq)
        scale = torch.where(explained > best, _divide(qx, qq), scale)
        best = torch.maximum(explained, best)
    flat = scale[..., 0]
    d = flat.gather(1, flat.abs().argmax(1, keepdim=True)) / -most
    d = torch.where(torch.isfinite(x).all(1, keepdim=True), d, torch.nan).half()
    sc = _divide(flat, d.float()).round_().clamp_(-most, most - 1)
    q = _divide(parts, (d.float() * sc).unsqueeze(-1)).round_().clamp_(-top, top - 1)
    return q, sc, d


def quantize_q6_k(x: Tensor) -> Tensor:
    """``[r, 256]`` to ``[r, 210]``: low nibbles (128), high bits (64), int8 scales of 16 sub-blocks
    of 16, d.
    """
    q, sc, d = _signed_sub_blocks(x, 32, 128)
    q = (q + 32).to(torch.uint8).view(-1, 2, 4, 32)  # two halves of four runs of 32
    low = torch.cat((q[:, :, 0] & 15 | (q[:, :, 2] & 15) << 4, q[:, :, 1] & 15 | (q[:, :, 3] & 15) << 4), 2)
    high = q[:, :, 0] >> 4 | q[:, :, 1] >> 4 << 2 | q[:, :, 2] >> 4 << 4 | q[:, :, 3] >> 4 << 6
    tail = (sc.to(torch.int8).view(torch.uint8), d.view(torch.uint8))
    return torch.cat((low.view(-1, 128), high.view(-1, 64), *tail), 1)


def dequantize_q6_k(blocks: Tensor) -> Tensor:
    """The inverse: ``[r, 210]`` to fp32 ``[r, 256]``."""
    low, high = blocks[:, :128].reshape(-1, 2, 64), blocks[:, 128:192].reshape(-1, 2, 32)
    runs = (low[:, :, :32] & 15, low[:, :, 32:] & 15, low[:, :, :32] >> 4, low[:, :, 32:] >> 4)
    q = torch.stack([run | (high >> 2 * i & 3) << 4 for i, run in enumerate(runs)], 2)
    sc = blocks[:, 192:208].contiguous().view(torch.int8).float()
    value = (q.float() - 32).view(-1, 16, 16) * (halves(blocks[:, 208:]) * sc).unsqueeze(-1)
    return value.view(-1, 256)


def quantize_q8_k(x: Tensor) -> Tensor:
    """``[r, 256]`` to ``[r, 292]``: fp32 d, codes, their sums over 16. The first largest becomes code -127.

    A block so small that -127 over its largest overflows is zeros, as one of zeros is.
    """
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
    inverse = torch.full_like(extreme, -127) / extreme
    inverse = torch.where(torch.isfinite(inverse), inverse, 0.0)
    d = _divide(torch.ones_like(inverse), inverse)
    d = torch.where(torch.isfinite(x).all(1, keepdim=True), d, torch.nan)
    q = (x * inverse).round_().to(torch.int8)
    sums = q.view(-1, 16, 16).sum(-1, dtype=torch.int16)
    return torch.cat([part.view(torch.uint8) for part in (d, q, sums)], 1)


def dequantize_q8_k(blocks: Tensor) -> Tensor:
    """The inverse: ``[r, 292]`` to fp32 ``[r, 256]``."""
    return q8_k_scales(blocks) * blocks[:, 4:260].contiguous().view(torch.int8).float()


def q8_k_scales(blocks: Tensor) -> Tensor:
    """d of every block: fp32 ``[r, 1]``."""
    return blocks[:, :4].contiguous().view(torch.float32)
