"""Quantizes BF16 and FP32 weights and BF16 activations, equal byte for byte to ``quantport.numerics``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantport.backend import Quant, Scheme, numerics
from quantport_cpu.jit import encode, quantize_rows
from quantport_cpu.jit.jobs import PER_TOKEN
from quantport_cpu.jit.memory import array, array_of_rows
from quantport_cpu.jit.parallel_for import threads_for

# By format: the kind of the kernel, the dtype of the scales that it writes, and that of the codes.
_KINDS = {
    "e4m3fn": (encode.FP8, torch.float32, torch.float8_e4m3fn),
    "int8": (encode.INT8, torch.float32, torch.int8),
    "int4": (encode.INT4, torch.bfloat16, torch.int32),
}
_SIZES = {torch.bfloat16: encode.BF16, torch.float32: encode.FP32}


def quantize_weight(weight: Tensor, scheme: Scheme) -> dict[str, Tensor] | None:
    """Quantizes one weight on the calling thread.

    Args:
        weight: bf16 or fp32 ``[n, k]`` with contiguous rows, on the CPU.
        scheme: The scheme.

    Returns:
        The tensors of ``scheme.layout(n, k)``, or None for what it does not serve (another dtype, an empty
        weight, a scheme without codes or with a solver of its own). Scales are NaN or Inf exactly where the
        weight holds a NaN or an Inf; the codes there mean nothing.
    """
    quant = scheme.weight
    if scheme.solver is not None or not _served(weight, *_SIZES):
        return None
    if (
        quant.format not in _KINDS
        or not quant.plain
        or quant.group_size % 8
        or quant.scale_dtype is not _KINDS[quant.format][1]
    ):
        return quantize_rows.quantize(weight, scheme) if weight.dtype is torch.bfloat16 else None
    stored = quantize_rows.empty_stored(weight, scheme)
    codes, scale = stored.values()
    _run(weight, quant, codes, scale, 1)
    return stored


def rows_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes activations per token, as ``numerics.quantize(x, Quant("int8", (1, 0)))`` does.

    Args:
        x: ``[M, K]``, any floating dtype; bf16 is fast.

    Returns:
        ``(codes int8 [M, K], scale fp32 [M, 1])``.
    """
    if not _served(x, torch.bfloat16):
        return numerics.quantize(x, PER_TOKEN)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    _run(x, PER_TOKEN, codes, scale, threads_for(x.numel()))
    return codes, scale


def _served(x: Tensor, *dtypes: torch.dtype) -> bool:
    return (
        x.dtype in dtypes and x.dim() == 2 and x.numel() > 0 and x.stride(1) == 1 and x.device.type == "cpu"
    )


def _run(x: Tensor, quant: Quant, codes: Tensor, scale: Tensor, threads: int) -> None:
    n, k = x.shape
    rows, cols = quant.block_shape[0] or n, quant.group_size or k
    panels, blocks = math.ceil(n / rows), math.ceil(k / cols)
    kind, scale_dtype, code_dtype = _KINDS[quant.format]
    width = math.ceil(k / 8) if quant.format == "int4" else k
    size = 12 * blocks  # bytes of scratch of one thread at a time
    encode.kernel(kind, _SIZES[x.dtype])(
        panels,
        array_of_rows(x, x.dtype, n, k),
        x.itemsize * x.stride(0),
        n,
        k,
        rows,
        cols,
        array(codes, code_dtype, n, width),
        width * code_dtype.itemsize,
        array(scale, scale_dtype, panels, blocks),
        quantize_rows.scratch_bytes(x, (panels if threads > 1 else 1) * size),
        size if threads > 1 else 0,
        quantize_rows.fp32_bits(quant.element.half_range),
        threads=threads,
    )
