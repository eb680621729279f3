"""The numerics again, written independently of quantport: NumPy in float32, ml_dtypes for e4m3fn, one block at a time."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from quantport.errors import QuantportError
from quantport.scheme import Quant

HALF = {"e4m3fn": 448.0, "int8": 127.5, "int4": 7.5}
RANGE = {"int8": (-128, 127), "int4": (-8, 7)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def blocks_of(n: int, k: int, quant: Quant) -> list[tuple[int, int, slice, slice]]:
    """(row of the scale, column of the scale, rows, columns) of every block, by plain loops."""
    rows, cols = quant.rows or max(n, 1), quant.cols or max(k, 1)
    return [
        (i, j, slice(i * rows, min(n, (i + 1) * rows)), slice(j * cols, min(k, (j + 1) * cols)))
        for i in range(math.ceil(n / rows))
        for j in range(math.ceil(k / cols))
    ]


def encode_np(ratio: np.ndarray, form: str) -> np.ndarray:
    """Codes as float32 values, from x / scale."""
    if form == "e4m3fn":
        return np.clip(ratio, np.float32(-448), np.float32(448)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    low, high = RANGE[form]
    return np.clip(np.rint(ratio), low, high).astype(np.float32)


def quantize_np(x: np.ndarray, quant: Quant) -> tuple[np.ndarray, np.ndarray]:
    """(codes as float32 values, scales) of a float32 matrix."""
    n, k = x.shape
    codes = np.zeros((n, k), np.float32)
    scales = np.full(quant.scale_shape(n, k), np.float32(2.0**-23), np.float32)
    for i, j, rows, cols in blocks_of(n, k, quant):
        amax = np.max(np.abs(x[rows, cols]))
        scale = np.float32(amax) / np.float32(HALF[quant.format])
        if quant.scale is torch.bfloat16:
            scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
        scales[i, j] = scale if scale != 0 else np.float32(2.0**-23)
        codes[rows, cols] = encode_np(x[rows, cols] / scales[i, j], quant.format)
    return codes, scales


def dequantize_np(codes: np.ndarray, scales: np.ndarray, quant: Quant) -> np.ndarray:
    out = np.zeros(codes.shape, np.float32)
    for i, j, rows, cols in blocks_of(*codes.shape, quant):
        out[rows, cols] = codes[rows, cols] * scales[i, j]
    return out


def same(found: Tensor, expected: np.ndarray) -> None:
    """Every element equal, the sign of zero included; names the first that is not."""
    actual = found.float().numpy()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    wrong = np.argwhere((actual != expected) | (np.signbit(actual) & (actual != 0) != np.signbit(expected) & (expected != 0)))
    where = tuple(wrong[0]) if len(wrong) else ()
    assert not len(wrong), f"{len(wrong)} of {actual.size} differ, first at {where}: {actual[where]!r}, not {expected[where]!r}"


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_parts(error: QuantportError, *named: str) -> None:
    """Three parts, each of which says something, and every word that the message must name."""
    for part in (error.asked, error.found, error.works):
        assert part.strip()
    for name in named:
        assert name in str(error), f"{name!r} is not named in: {error}"
