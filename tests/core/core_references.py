"""The numerics again, written independently of quantport: NumPy in float32, ml_dtypes for the floats, one
block at a time.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from quantport.errors import QuantportError
from quantport.numerics.codebooks import CODEBOOKS
from quantport.scheme import Quant

SMALL = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
HALF = {
    "e4m3fn": 448.0,
    "e3m2": 28.0,
    "e2m3": 7.5,
    "e2m1": 6.0,
    "int8": 127.5,
    "int4": 7.5,
    "nf4": 1.0,
    "fp4": 1.0,
}
EMAX = {"e4m3fn": 8, "e3m2": 4, "e2m3": 2, "e2m1": 2}
MANTISSA = {"e4m3fn": 3, "e3m2": 2, "e2m3": 3, "e2m1": 1}
RANGE = {"int8": (-128, 127), "int4": (-8, 7)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def blocks_of(n: int, k: int, quant: Quant) -> list[tuple[int, int, slice, slice]]:
    """(row of the scale, column of the scale, rows, columns) of every block, by plain loops."""
    rows, cols = quant.block_shape[0] or max(n, 1), quant.group_size or max(k, 1)
    return [
        (i, j, slice(i * rows, min(n, (i + 1) * rows)), slice(j * cols, min(k, (j + 1) * cols)))
        for i in range(math.ceil(n / rows))
        for j in range(math.ceil(k / cols))
    ]


def encode_np(ratio: np.ndarray, form: str) -> np.ndarray:
    """Codes as the float32 values that they stand for, from x / scale."""
    if form in SMALL:
        top = np.float32(HALF[form])
        return np.clip(ratio, -top, top).astype(SMALL[form]).astype(np.float32)
    if form in RANGE:
        low, high = RANGE[form]
        return np.clip(np.rint(ratio), low, high).astype(np.float32)
    # ascending: argmin takes the lower of two that are as near
    table = np.unique(np.array(CODEBOOKS[form], np.float32))
    middles = (table[1:] + table[:-1]) / np.float32(2)
    return table[(ratio[..., None] > middles).sum(-1)]


def power_np(amax: float, form: str, rule: str) -> float:
    """Power-of-two scale of a block, in the words of its rule."""
    if amax == 0:
        return 2.0**-127
    mantissa, exponent = math.frexp(amax)  # amax = 2 mantissa * 2**(exponent - 1), 2 mantissa in [1, 2)
    mantissa, exponent = 2 * mantissa, exponent - 1
    if rule == "ceil":
        exponent += mantissa > 1
    elif rule in ("even", "even1"):
        exponent += mantissa >= 2 - 2.0 ** -(1 + (1 if rule == "even1" else MANTISSA[form]))
    return 2.0 ** min(max(exponent - EMAX[form], -127), 127 - EMAX[form])


def scale_np(amax: np.floating, quant: Quant) -> np.float32:
    if quant.scale == "e8m0":
        return np.float32(power_np(float(amax), quant.format, quant.rule))
    scale = np.float32(amax) / np.float32(HALF[quant.format])
    if quant.scale == "bf16":
        scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    return scale if scale != 0 else np.float32(2.0**-23)


def quantize_np(x: np.ndarray, quant: Quant) -> tuple[np.ndarray, np.ndarray]:
    """(the values of the codes, those of the scales) of a float32 matrix: one level, no offsets."""
    n, k = x.shape
    codes = np.zeros((n, k), np.float32)
    scales = np.zeros(quant.scale_shape(n, k), np.float32)
    for i, j, rows, cols in blocks_of(n, k, quant):
        scales[i, j] = scale_np(np.max(np.abs(x[rows, cols])), quant)
        codes[rows, cols] = encode_np(x[rows, cols] / scales[i, j], quant.format)
    return codes, scales


def dequantize_np(codes: np.ndarray, scales: np.ndarray, quant: Quant) -> np.ndarray:
    out = np.zeros(codes.shape, np.float32)
    for i, j, rows, cols in blocks_of(*codes.shape, quant):
        with np.errstate(over="ignore"):  # near the end of fp32 a value may round up to Inf
            out[rows, cols] = codes[rows, cols] * scales[i, j]
    return out


def same(found: Tensor, expected: np.ndarray) -> None:
    """Every element equal, the sign of zero included; names the first that is not."""
    actual = found.float().numpy()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    wrong = np.argwhere(
        (actual != expected) | (np.signbit(actual) & (actual != 0) != np.signbit(expected) & (expected != 0))
    )
    where = tuple(wrong[0]) if len(wrong) else ()
    assert not len(wrong), (
        f"{len(wrong)} of {actual.size} differ, first at {where}: {actual[where]!r}, not {expected[where]!r}"
    )


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_parts(error: QuantportError, *named: str) -> None:
    """Three parts, each of which says something, and every word that the message must name."""
    for part in (error.asked, error.found, error.suggestion):
        assert part.strip()
    for name in named:
        assert name in str(error), f"{name!r} is not named in: {error}"
