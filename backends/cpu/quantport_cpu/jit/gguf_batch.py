"""Multiplies by a weight in blocks of GGUF, and decodes it: ``gemv_gguf`` called with tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from quantport_cpu.jit import gemm_gguf, gemv_gguf, gguf_rows
from quantport_cpu.jit.memory import Array, array
from quantport_cpu.jit.parallel_for import threads_for
from quantport_cpu.jit.quantize_rows import scratch_bytes
from quantport_cpu.jit.small_batch import DECODED, SPAN, empty_fp32, padded_fp32


def columns_of(blocks: Tensor, name: str) -> int:
    """Columns of a weight in whole blocks of GGUF, uint8 ``[N, bytes]``."""
    number = gemv_gguf.NUMBERS[name]
    return blocks.shape[1] // gemv_gguf.BYTES[number] * gemv_gguf.COLUMNS[number]


def multiply(x: Tensor, blocks: Tensor, name: str) -> Tensor:
    """x times a weight in blocks of GGUF.

    Args:
        x: ``[M, K]``, M from 1, K up to the columns of the blocks, any floating dtype.
        blocks: uint8 ``[N, bytes]``, contiguous.
        name: The block type.

    Returns:
        fp32 ``[M, N]``.
    """
    m, n, k = x.shape[0], blocks.shape[0], columns_of(blocks, name)
    values, out = padded_fp32(x, m, k), empty_fp32(x, m, n)
    _run(blocks, name, array(values, torch.float32, m, k), array(out, torch.float32, m, n), m)
    return out


def multiply_quantized(x: Tensor, blocks: Tensor, name: str) -> Tensor:
    """x, quantized as ggml does for this block type, times a weight in blocks of GGUF; arguments as for
    ``multiply``.
    """
    m, (n, size), number = x.shape[0], blocks.shape, gemv_gguf.NUMBERS[name]
    rows, out = quantized_rows(x, gemm_gguf.rows_kind(number)), empty_fp32(x, m, n)
    gemm_gguf.kernel(name)(
        -(-n // SPAN),
        rows,
        rows.size // m,
        array(blocks, torch.uint8, n, size),
        n,
        size // gemv_gguf.BYTES[number],
        array(out, torch.float32, m, n),
        4 * n,
        m,
        SPAN,
        threads=threads_for(n * columns_of(blocks, name)),
    )
    return out


def quantized_rows(x: Tensor, kind: int) -> Array:
    """Activations ``[M, K]``, any floating dtype, as ``gguf_rows`` writes them in one of its kinds."""
    m, k = x.shape
    if x.dtype is not torch.bfloat16 or not x.is_contiguous():
        x = x.float().contiguous()
    stride = -(-k // gguf_rows.COLUMNS[kind]) * gguf_rows.BLOCK_BYTES[kind]
    rows, source = scratch_bytes(x, m * stride), array(x, x.dtype, m, k)
    gguf_rows.kernel(kind, x.itemsize)(m, source, x.itemsize * k, k, rows, stride, threads=threads_for(m * k))
    return rows


def decode(blocks: Tensor, name: str, out: Tensor) -> Tensor:
    """Writes a weight in blocks of GGUF to ``out`` ``[N, columns of the blocks]``, fp32 or bf16."""
    n, k = blocks.shape[0], columns_of(blocks, name)
    _run(blocks, name, None, array(out, out.dtype, n, k), DECODED[out.dtype])
    return out


def _run(blocks: Tensor, name: str, x: Array | None, out: Array, rows: int) -> None:
    """Writes to ``out`` the products of ``rows`` rows of x, or, without x, the weight as ``rows`` says."""
    (n, size), k, span = blocks.shape, columns_of(blocks, name), SPAN if x else 4
    gemv_gguf.kernel(name)(
        -(-n // span),
        x or 0,
        4 * k,
        array(blocks, torch.uint8, n, size),
        n,
        size // gemv_gguf.BYTES[gemv_gguf.NUMBERS[name]],
        out,
        4 * n,
        rows,
        span,
        threads=threads_for(n * k),
    )
