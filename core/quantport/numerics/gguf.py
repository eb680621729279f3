"""GGUF block types of weights, q4_0 to q8_0 and the K types q2_k to q6_k, and of activations, q8_0 and q8_k.

Layouts: ggml ``ggml-common.h``. A weight ``[n, k]`` is stored as uint8 ``[n, ceil(k / block) * bytes]``; a
short last block is filled with zeros (a GGUF file itself wants k to be a multiple of the block). Types of 32
elements and q8_k are quantized as ggml's reference does, byte for byte; any filling of the other K types is
valid, and ``kquants`` fills them by least squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantport.numerics import kquants
from quantport.numerics.scales import over
from quantport.scheme.formats import Format
from quantport.scheme.scheme import GGUF_BYTES

CHUNK = 1 << 18
LARGEST = 128 * 32  # of Q6_K: no value of any type is above its fp16 scale, or offset, times this
_SCALES_AT = {  # where fp16 numbers are in a block; of the others at its start, and one
    "q4_1": (0, 4),
    "q5_1": (0, 4),
    "q2_k": (80, 84),
    "q3_k": (108, 110),
    "q4_k": (0, 4),
    "q5_k": (0, 4),
    "q6_k": (208, 210),
}


def quantize(weight: Tensor, element: Format) -> Tensor:
    """Quantizes ``[n, k]``, any floating dtype, to blocks uint8 ``[n, ceil(k / block) * bytes]``."""
    n, k = weight.shape
    block, size = element.block, GGUF_BYTES[element.name]
    out = torch.empty(n, -(-k // block) * size, dtype=torch.uint8, device=weight.device)
    if not weight.numel():
        return out
    step = max(1, CHUNK // k)
    for i in range(0, n, step):
        rows = torch.nn.functional.pad(weight[i : i + step].float(), (0, -k % block))
        out[i : i + step] = _QUANTIZE[element.name](rows.view(-1, block)).view(rows.shape[0], -1)
    return out


def dequantize(blocks: Tensor, element: Format, k: int) -> Tensor:
    """Blocks uint8 ``[n, bytes]`` to fp32 ``[n, k]``."""
    flat = blocks.reshape(-1, GGUF_BYTES[element.name])
    values = _DEQUANTIZE[element.name](flat)
    return values.view(blocks.shape[0], -(-k // element.block) * element.block)[:, :k].contiguous()


def scales(blocks: Tensor, element: Format) -> Tensor:
    """The scale of every block ``[r, 1]``, of types with offsets that of the offsets too ``[r, 2]``, in fp32:
    NaN or Inf where the weight held one.
    """
    flat = blocks.reshape(-1, GGUF_BYTES[element.name])
    if element.name == "q8_k":
        return kquants.q8_k_scales(flat)
    start, end = _SCALES_AT.get(element.name, (0, 2))
    return kquants.halves(flat[:, start:end])


def _centred(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Codes 0..2 * top - 1 of ``[r, 32]``, and bytes of d: the largest magnitude becomes code 0, which is
    -top times d.
    """
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
    d = extreme / -top
    inverse = torch.where(d == 0, 0.0, 1 / d)
    q = (x * inverse + (top + 0.5)).trunc().clamp_(0, 2 * top - 1).to(torch.uint8)
    return q, kquants.half_bytes(_unless_finite(x, d))


def _from_least(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Codes 0..top of ``[r, 32]`` from the smallest value up, and bytes of d and of that value."""
    least = x.amin(1, keepdim=True)
    d = over(x.amax(1, keepdim=True) - least, top)
    inverse = torch.where(d == 0, 0.0, 1 / d)
    q = ((x - least) * inverse + 0.5).trunc().clamp_(0, top).to(torch.uint8)
    return q, torch.cat((kquants.half_bytes(_unless_finite(x, d)), kquants.half_bytes(least)), 1)


def _unless_finite(x: Tensor, d: Tensor) -> Tensor:
    return torch.where(torch.isfinite(x).all(1, keepdim=True), d, torch.nan)


def _pack_nibbles(q: Tensor) -> Tensor:
    """Low nibbles of codes ``[r, 32]``: j low, j + 16 high."""
    return q[:, :16] & 15 | q[:, 16:] << 4


def _unpack_nibbles(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), 1)


def _pack_fifth_bits(q: Tensor) -> Tensor:
    """Bit 4 of codes ``[r, 32]``, eight to a byte, the first lowest."""
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=q.device)
    return ((q >> 4).view(-1, 4, 8) * weights).sum(2, dtype=torch.uint8)


def _unpack_fifth_bits(packed: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(2) >> shifts & 1).view(-1, 32) << 4


def _quantize_q4_0(x: Tensor) -> Tensor:
    """Blocks of 32: fp16 d, then codes j (low nibble) and j + 16 (high)."""
    q, d = _centred(x, 8)
    return torch.cat((d, _pack_nibbles(q)), 1)


def _dequantize_q4_0(blocks: Tensor) -> Tensor:
    return kquants.halves(blocks[:, :2]) * (_unpack_nibbles(blocks[:, 2:]).float() - 8)


def _quantize_q4_1(x: Tensor) -> Tensor:
    """Blocks of 32: fp16 d, fp16 least value, then nibbles as q4_0 has them."""
    q, d = _from_least(x, 15)
    return torch.cat((d, _pack_nibbles(q)), 1)


def _dequantize_q4_1(blocks: Tensor) -> Tensor:
    return _add_least(_unpack_nibbles(blocks[:, 4:]), blocks)


def _quantize_q5_0(x: Tensor) -> Tensor:
    """Blocks of 32: fp16 d, 4 bytes of fifth bits, then nibbles as q4_0 has them."""
    q, d = _centred(x, 16)
    return torch.cat((d, _pack_fifth_bits(q), _pack_nibbles(q)), 1)


def _dequantize_q5_0(blocks: Tensor) -> Tensor:
    q = _unpack_nibbles(blocks[:, 6:]) | _unpack_fifth_bits(blocks[:, 2:6])
    return kquants.halves(blocks[:, :2]) * (q.float() - 16)


def _quantize_q5_1(x: Tensor) -> Tensor:
    """Blocks of 32: fp16 d, fp16 least value, 4 bytes of fifth bits, then nibbles."""
    q, d = _from_least(x, 31)
    return torch.cat((d, _pack_fifth_bits(q), _pack_nibbles(q)), 1)


def _dequantize_q5_1(blocks: Tensor) -> Tensor:
    return _add_least(_unpack_nibbles(blocks[:, 8:]) | _unpack_fifth_bits(blocks[:, 4:8]), blocks)


def _add_least(q: Tensor, blocks: Tensor) -> Tensor:
    both = kquants.halves(blocks[:, :4])
    return both[:, :1] * q.float() + both[:, 1:]


def _quantize_q8_0(x: Tensor) -> Tensor:
    """Blocks of 32: fp16 d, then int8 codes. Halves round away from zero, as C's ``roundf`` does."""
    d = over(x.abs().amax(1, keepdim=True), 127)
    inverse = torch.where(d == 0, 0.0, 1 / d)
    scaled = x * inverse
    whole = scaled.abs().floor()
    q = scaled.sign() * (whole + (2 * (scaled.abs() - whole)).floor())
    return torch.cat((kquants.half_bytes(d), q.to(torch.int8).view(torch.uint8)), 1)


def _dequantize_q8_0(blocks: Tensor) -> Tensor:
    return kquants.halves(blocks[:, :2]) * blocks[:, 2:].contiguous().view(torch.int8).float()


_QUANTIZE = {
    "q4_0": _quantize_q4_0,
    "q4_1": _quantize_q4_1,
    "q5_0": _quantize_q5_0,
    "q5_1": _quantize_q5_1,
    "q8_0": _quantize_q8_0,
    "q2_k": kquants.quantize_q2_k,
    "q3_k": kquants.quantize_q3_k,
    "q4_k": kquants.quantize_q4_k,
    "q5_k": kquants.quantize_q5_k,
    "q6_k": kquants.quantize_q6_k,
    "q8_k": kquants.quantize_q8_k,
}
_DEQUANTIZE = {
    "q4_0": _dequantize_q4_0,
    "q4_1": _dequantize_q4_1,
    "q5_0": _dequantize_q5_0,
    "q5_1": _dequantize_q5_1,
    "q8_0": _dequantize_q8_0,
    "q2_k": kquants.dequantize_q2_k,
    "q3_k": kquants.dequantize_q3_k,
    "q4_k": kquants.dequantize_q4_k,
    "q5_k": kquants.dequantize_q5_k,
    "q6_k": kquants.dequantize_q6_k,
    "q8_k": kquants.dequantize_q8_k,
}
