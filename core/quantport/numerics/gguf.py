"""GGUF block types of weights, q4_0, q8_0, q4_k, q5_k, q6_k, and of activations, q8_0 and q8_k.

Layouts: ggml ``ggml-common.h``. A weight ``[n, k]`` is stored as uint8 ``[n, ceil(k / block) * bytes]``; a
short last block is filled with zeros (a GGUF file itself wants k to be a multiple of the block). q4_0, q8_0
and q8_k are quantized as ggml's reference does, byte for byte; any filling of the other K types is valid, and
``kquants`` fills them by least squares.
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
    """The scale of every block ``[r, 1]``, of q4_k and q5_k that of its offsets too ``[r, 2]``, as fp32;
    NaN or Inf where the weight held one.
    """
    flat = blocks.reshape(-1, GGUF_BYTES[element.name])
    if element.name == "q8_k":
        return kquants.q8_k_scales(flat)
    start, end = {"q6_k": (208, 210), "q4_k": (0, 4), "q5_k": (0, 4)}.get(element.name, (0, 2))
    return kquants.halves(flat[:, start:end])


def _quantize_q4_0(x: Tensor) -> Tensor:
    """Blocks of 32: fp16 d, then codes j (low nibble) and j + 16 (high). The largest magnitude becomes code
    -8.
    """
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
    d = extreme / -8
    inverse = torch.where(d == 0, 0.0, 1 / d)
    q = (x * inverse + 8.5).trunc().clamp_(0, 15).to(torch.uint8)
    d = torch.where(torch.isfinite(x).all(1, keepdim=True), d, torch.nan)
    return torch.cat((kquants.half_bytes(d), q[:, :16] | q[:, 16:] << 4), 1)


def _dequantize_q4_0(blocks: Tensor) -> Tensor:
    q = torch.cat((blocks[:, 2:] & 15, blocks[:, 2:] >> 4), 1)
    return kquants.halves(blocks[:, :2]) * (q.float() - 8)


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
    "q8_0": _quantize_q8_0,
    "q4_k": kquants.quantize_q4_k,
    "q5_k": kquants.quantize_q5_k,
    "q6_k": kquants.quantize_q6_k,
    "q8_k": kquants.quantize_q8_k,
}
_DEQUANTIZE = {
    "q4_0": _dequantize_q4_0,
    "q8_0": _dequantize_q8_0,
    "q4_k": kquants.dequantize_q4_k,
    "q5_k": kquants.dequantize_q5_k,
    "q6_k": kquants.dequantize_q6_k,
    "q8_k": kquants.dequantize_q8_k,
}
