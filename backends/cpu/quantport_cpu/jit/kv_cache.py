"""The kernels of the quantized KV cache, called with tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from quantport.backend import KVKernel, Quant, once
from quantport_cpu.jit import kv_attention, kv_encode
from quantport_cpu.jit.kv_attention import CHUNK, LANES, row_bytes, work_bytes
from quantport_cpu.jit.memory import Array, array, array_of_heads, constants, table
from quantport_cpu.jit.parallel_for import threads_for
from quantport_cpu.jit.quantize_rows import fp32_bits

DTYPES = {
    torch.bfloat16: kv_encode.BF16,
    torch.float16: kv_encode.FP16,
    torch.float32: kv_encode.FP32,
}
_SPAN = 64  # tokens that a thread quantizes at a time
_MIN_PART = 256  # tokens of a part: below it, joining parts costs more than sharing them saves
_BLOCKS_PER_THREAD = 4  # so that threads end at about the same time


@once
def _zeros() -> Array:
    return constants([0.0] * CHUNK)


class CpuKVKernel(KVKernel):
    """Compiled for the machine, for heads of a multiple of 16 elements."""

    def serves(self, quant: Quant, key_width: int, value_width: int, dtype: torch.dtype) -> bool:
        """Every format of the cache, in bf16, fp16 and fp32."""
        return dtype in DTYPES and key_width % LANES == value_width % LANES == 0

    def encode(self, states: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor], quant: Quant) -> None:
        """One launch for keys and values."""
        encode(states, rows, quant)

    def attend(
        self, query: Tensor, rows: tuple[Tensor, Tensor], quant: Quant, mask: Tensor | None, scale: float
    ) -> Tensor:
        """One launch, and the casts around it."""
        return attend(query, *rows, quant.format, mask, scale).to(query.dtype)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, element: str, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention over rows of the KV cache.

    Args:
        query: ``[batch, heads * n, rows, key width]``, any floating dtype.
        keys: uint8 ``[batch, heads, tokens, row bytes]``; the rows of a head lie one behind the other.
        values: As keys.
        element: Format of the codes.
        mask: fp32 or bool ``[batch or 1, heads * n or 1, rows or 1, tokens or 1]``: added, or where to
            attend. None for none.
        scale: What products are multiplied by.

    Returns:
        fp32 ``[batch, heads * n, rows, value width]``.
    """
    (batch, q_heads, q_rows, k_width), (_, heads, tokens, _) = query.shape, keys.shape
    v_width = (values.shape[3] - kv_attention.SCALE_BYTES) * 8 // kv_attention.bits(element)
    rows, pairs = q_heads // heads * q_rows, batch * heads
    tile = min(rows, 2) if rows < 3 else 4
    padded = -(-rows // tile) * tile
    q = query.to(torch.float32).reshape(pairs, rows, k_width)
    q = torch.nn.functional.pad(q, (0, 0, 0, padded - rows)) if padded > rows else q.contiguous()
    threads = threads_for(pairs * tokens * (k_width + v_width))
    parts = max(1, min(-(-_BLOCKS_PER_THREAD * threads // pairs), tokens // _MIN_PART))
    span = -(-tokens // (parts * CHUNK)) * CHUNK
    parts = -(-tokens // span)
    out = query.new_empty(batch, q_heads, q_rows, v_width, dtype=torch.float32)
    stride = work_bytes(padded, v_width, tile)
    work = torch.empty(pairs * parts * stride, dtype=torch.uint8, device=query.device)
    counters = torch.zeros(pairs, dtype=torch.int64, device=query.device)
    added, steps = _mask(mask, heads, rows, q_heads, q_rows, tokens)
    key_rows, key_steps = array_of_heads(keys, batch, heads, tokens, row_bytes(element, k_width))
    value_rows, value_steps = array_of_heads(values, batch, heads, tokens, row_bytes(element, v_width))
    line = (
        array(q, torch.float32, pairs, padded, k_width),
        key_rows,
        value_rows,
        added,
        array(out, torch.float32, *out.shape),
        array(work, torch.uint8, *work.shape),
        array(counters, torch.int64, pairs),
        heads,
        rows,
        tokens,
        span,
        parts,
        fp32_bits(scale),
        *key_steps,
        *value_steps,
        *steps,
        stride,
        k_width,
    )
    kv_attention.kernel(element, k_width, v_width, tile)(pairs * parts, table([line]), threads=threads)
    return out


def encode(states: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor], quant: Quant) -> None:
    """Quantizes keys and values ``[batch, heads, tokens, width]``, bf16, fp16 or fp32, into rows of the KV
    cache.

    Args:
        states: Both; they are made contiguous.
        rows: Where to write both: uint8 ``[batch, heads, tokens, row bytes]``, those of a head one behind the
            other.
        quant: Format of the codes and their scale.
    """
    batch, heads, tokens, k_width = states[0].shape
    v_width = states[1].shape[3]
    (k_rows, k_steps), (v_rows, v_steps) = (
        array_of_heads(r, batch, heads, tokens, row_bytes(quant.format, s.shape[3]))
        for r, s in zip(rows, states, strict=True)
    )
    dtype = states[0].dtype
    sources = [array(s.contiguous(), dtype, *s.shape) for s in states]
    kv_encode.kernel(quant.format, k_width, v_width, DTYPES[dtype])(
        batch * heads * -(-tokens // _SPAN),
        *sources,
        k_rows,
        v_rows,
        *k_steps,
        *v_steps,
        heads,
        tokens,
        _SPAN,
        fp32_bits(quant.element.half_range),
        threads=threads_for(batch * heads * tokens * (k_width + v_width)),
    )


def _mask(
    mask: Tensor | None, heads: int, rows: int, q_heads: int, q_rows: int, tokens: int
) -> tuple[Array, tuple[int, int, int, int]]:
    """The mask as fp32, each row with room for whole steps behind it; and its bytes from batch to batch, from
    head to head of keys, from row to row, and from token to token.
    """
    if mask is None:
        return _zeros(), (0, 0, 0, 0)
    padded = -(-tokens // CHUNK) * CHUNK
    per_head = mask.shape[1] > 1 or mask.shape[2] > 1
    shape = (mask.shape[0], q_heads, q_rows) if per_head else (mask.shape[0], 1, 1)
    out = torch.zeros(*shape, padded, dtype=torch.float32, device=mask.device)
    if mask.dtype is torch.bool:
        out[..., :tokens].masked_fill_(~mask, -torch.inf)
    else:
        out[..., :tokens] = mask
    row = 4 * padded
    steps = (rows * row * heads, rows * row, row) if per_head else (row, 0, 0)
    return array(out, torch.float32, *out.shape), (steps[0] if mask.shape[0] > 1 else 0, *steps[1:], 4)
