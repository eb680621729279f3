"""Symmetric block quantization of a matrix, in fp32 arithmetic, chunked by rows so that scratch stays in cache.

``scale = amax / half_range`` (an all-zero block gets 2**-23), ``code = clamp(round_half_even(x / scale))``, by true
division. Source: compressed-tensors ``calculate_qparams`` (symmetric) on fp32 input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantport.errors import WeightError
from quantport.formats import Format
from quantport.scheme import Quant

CHUNK = 1 << 18  # elements of fp32 scratch: 1 MiB, which fits the L2 cache of one core
EPS = 2.0**-23


def scale_of(amax: Tensor, quant: Quant) -> Tensor:
    """Scale of each block from its largest magnitude; fp32 in, fp32 values of ``quant.scale`` out, NaN and Inf kept."""
    scale = (amax / quant.element.half_range).to(quant.scale).float()
    return torch.where(scale == 0, EPS, scale)


def encode(x: Tensor, element: Format) -> Tensor:
    """Rounds scaled fp32 values to codes. Overwrites ``x``.

    Round to nearest even, saturating; subnormals of e4m3fn and e5m2 are kept.

    Returns:
        The shape of ``x``: the storage dtype of a float format, int8 codes for the integers.
    """
    if element.storage.is_floating_point:
        return x.clamp_(element.low, element.high).to(element.storage)
    return x.round_().clamp_(element.low, element.high).to(torch.int8)


def _blocks(x: Tensor, quant: Quant) -> Tensor:
    """Views a chunk ``[r, k]`` as ``[R, rows, C, cols]``, zero-padding where the last block is short."""
    rows, cols = quant.rows or x.shape[0], quant.cols or x.shape[1]
    pad = (0, -x.shape[1] % cols, 0, -x.shape[0] % rows)
    if any(pad):
        x = torch.nn.functional.pad(x, pad)
    return x.view(x.shape[0] // rows, rows, x.shape[1] // cols, cols)


def _chunk_rows(shape: torch.Size, quant: Quant, device: torch.device) -> int:
    step = quant.rows or 1
    if device.type != "cpu":  # an accelerator wants few large kernels: 64 MiB of scratch
        return max(step, (CHUNK << 6) // max(1, shape[1]) // step * step)
    return max(step, CHUNK // max(1, shape[1]) // step * step)


def quantize(x: Tensor, quant: Quant, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantizes a matrix.

    Args:
        x: ``[n, k]``, any floating dtype. NaN and Inf are not looked for: they show up in the scales.
        quant: Element format and block shape.
        scale: Scales to use instead of those from amax (for example reduced over ranks): fp32 values of ``quant.scale``,
            of shape ``quant.scale_shape(n, k)``.

    Returns:
        ``(codes, scale)``: codes ``[n, k]`` as float8 or int8, scale of dtype
        ``quant.scale`` and shape ``quant.scale_shape(n, k)``.
    """
    n, k = x.shape
    element = quant.element
    dtype = element.storage if element.storage.is_floating_point else torch.int8
    codes = torch.empty((n, k), dtype=dtype, device=x.device)
    if scale is None and not quant.rows and x.numel():
        scale = scale_of(_amax(x, quant), quant)
    scales = torch.full(quant.scale_shape(n, k), EPS, device=x.device) if scale is None else scale
    if not codes.numel():
        return codes, scales.to(quant.scale)
    step = _chunk_rows(x.shape, quant, x.device)
    for i in range(0, n, step):
        blocks = _blocks(x[i : i + step].to(torch.float32, copy=True), quant)
        r = slice(i // quant.rows, i // quant.rows + blocks.shape[0]) if quant.rows else slice(0, 1)
        if scale is None:
            scales[r] = scale_of(blocks.abs().amax((1, 3)), quant)
        divided = blocks.div_(scales[r, None, :, None])
        rows = codes[i : i + step]
        rows.copy_(encode(divided, element).view(-1, divided.shape[2] * divided.shape[3])[: rows.shape[0], :k])
    return codes, scales.to(quant.scale)


def _amax(x: Tensor, quant: Quant) -> Tensor:
    """Largest magnitude over all rows, per column block: fp32 ``[1, C]``."""
    low, high = torch.aminmax(x, dim=0)
    amax = torch.maximum(-low, high).float()[None]
    return _blocks(amax, quant).amax((1, 3))


def dequantize(codes: Tensor, scale: Tensor, quant: Quant, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns ``codes * scale`` as ``[n, k]``; the product is made in fp32 and rounded once to ``dtype``."""
    n, k = codes.shape
    wide = scale.float().repeat_interleave(quant.cols or max(k, 1), 1)[:, :k]
    if quant.rows != 1:
        wide = wide.repeat_interleave(quant.rows or max(n, 1), 0)[:n]
    return (codes.float() * wide).to(dtype)


def check_finite(scale: Tensor, name: str) -> None:
    """Refuses a weight whose scales are not finite, which happens exactly when the weight holds a NaN or an Inf.

    Raises:
        WeightError: names the weight.
    """
    if not torch.isfinite(scale).all():
        raise WeightError(
            f"quantize {name}",
            "the weight holds NaN or Inf",
            "mend the checkpoint, add the layer to ignore=, or pass nonfinite='zero' to read them as 0",
        )
