"""The two-level schemes and HQQ against plain NumPy written from their descriptions; rotation against a
matrix.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from core_peers import normal
from torch import Tensor

from quantport import numerics
from quantport.numerics.blocks import quantize_blocks
from quantport.scheme.catalog import BUILTIN

BF16, FP16 = torch.bfloat16, torch.float16
DUAL = BUILTIN["mxfp4_dualscale"].activation


def dual_np(x: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, level-1 bytes and level-0 scales of Ascend's documentation, one block at a time."""
    kind = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}[x.dtype]
    values = x.float().numpy()
    n, k = values.shape
    codes = np.zeros((n, k), np.uint8)
    level1, level0 = np.zeros((n, -(-k // 32)), np.uint8), np.zeros((n, -(-k // 512)), np.float32)
    for i in range(n):
        for j in range(0, k, 512):
            big = values[i, j : j + 512]
            s0 = np.float32(np.abs(big).max()) / np.float32(6)
            s0 = s0 or np.float32(2.0**-23)
            level0[i, j // 512] = s0
            temp = (big / s0).astype(kind).astype(np.float32)
            for b in range(0, len(temp), 32):
                small = temp[b : b + 32]
                amax = float(np.abs(small).max())
                exponent = int(np.clip(np.floor(np.log2(amax)) - 2 if amax else -127, -127, 127))
                level1[i, (j + b) // 32] = exponent + 127
                quotient = np.clip(small / np.float32(2.0**exponent), -6, 6)
                codes[i, j + b : j + b + len(small)] = quotient.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return codes, level1, level0


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "k"), [(64, 2048), (3, 512), (5, 544), (2, 1), (3, 33), (1, 1000)])
def test_dual_scale_is_what_ascend_documents(n, k, dtype):
    x = normal(n, k, spread=1.0).to(dtype)
    x[0] = 0
    blocks = quantize_blocks(x, DUAL)
    for found, expected in zip((blocks.codes, blocks.scale, blocks.outer), dual_np(x), strict=True):
        assert (found.numpy() == expected).all()
    assert blocks.zero is None
    value = numerics.dequantize(blocks.codes, blocks.scale, DUAL, outer=blocks.outer)
    codes = blocks.codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    inner = codes * np.exp2(blocks.scale.numpy().astype(np.float32) - 127).repeat(32, 1)[:, :k]
    assert (value.numpy() == inner * blocks.outer.numpy().repeat(512, 1)[:, :k]).all()


def test_dual_scale_golden():
    """All 8: level 0 is 8 / 6, the quotient is 6 in bf16, level 1 is 2**0, and every byte is 0x77. Weight and
    activation.
    """
    x = torch.full((1, 512), 8.0, dtype=BF16)
    blocks = quantize_blocks(x, DUAL)
    assert (numerics.pack_bits(blocks.codes, 4) == 0x77).all()
    assert abs(blocks.outer.item() - 1.3333) < 1e-4
    assert (blocks.scale == 127).all()
    stored = numerics.quantize_weight(x, BUILTIN["mxfp4_dualscale:floor"])
    assert (stored["weight_packed"] == 0x77).all()
    assert abs(stored["weight_outer_scale"].item() - 1.3333) < 1e-4
    assert (stored["weight_scale"] == 127).all()
    assert (numerics.dequantize_weight(stored, BUILTIN["mxfp4_dualscale"], 512) == 8).all()


def hqq_np(x: np.ndarray) -> np.ndarray:
    """HQQ of blocks ``[b, 64]`` as it is published: scale and zero point of min and max, 20 steps of the
    proximal solver.
    """
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    scale = 15 / (high - low)
    zero = -low * scale
    beta, best, kept = 10.0, np.inf, zero
    for _ in range(20):
        q = np.clip(np.rint(x * scale + zero), 0, 15)
        error = x - (q - zero) / scale
        if np.abs(error).mean() >= best:
            break
        best, kept = np.abs(error).mean(), zero
        size = np.maximum(np.abs(error), 1e-30)
        shrunk = np.sign(error) * np.maximum(size - size**-0.3 / beta, 0)
        zero = (q - (x - shrunk) * scale).mean(1, keepdims=True)
        beta *= 1.01
    q = np.clip(np.rint(x * scale + kept), 0, 15)
    values: np.ndarray = (q - kept) / scale
    return values


@pytest.mark.parametrize("outliers", [False, True])
def test_hqq_is_no_worse_than_its_publication(outliers):
    """In mean absolute error, what the solver lowers; our scales and offsets are stored in bf16, the oracle's
    are exact.
    """
    x = normal(128, 512, spread=0.3) * 0.05
    if outliers:
        x[:, ::37] *= 6
    expected = hqq_np(x.view(-1, 64).double().numpy()).reshape(128, 512)
    stored = numerics.quantize_weight(x, BUILTIN["int4_hqq"])
    error = (numerics.dequantize_weight(stored, BUILTIN["int4_hqq"], 512) - x).abs().mean().item()
    assert error < 1.02 * np.abs(expected - x.numpy()).mean()


@pytest.mark.parametrize("k", [1, 7, 12, 96, 128, 640])
def test_rotation_is_a_hadamard_matrix(k):
    """The largest power of two that divides k, up to 128; orthogonal, symmetric, its own inverse."""
    size = next(s for s in (128, 64, 32, 16, 8, 4, 2, 1) if k % s == 0)
    matrix = np.array([[1.0]])
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    x = normal(5, k)
    expected = (x.double().numpy().reshape(5, -1, size) @ matrix / np.sqrt(size)).reshape(5, k)
    found = numerics.rotate(x, 128)
    assert np.allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert torch.allclose(numerics.rotate(found, 128), x, rtol=1e-5, atol=1e-5 * x.abs().max().item())
    y = normal(3, k, seed=1)
    size_of_sum = (y.abs() @ x.abs().t()).max().item()
    assert torch.allclose(numerics.rotate(y, 128) @ found.t(), y @ x.t(), rtol=1e-4, atol=1e-4 * size_of_sum)
    assert torch.equal(numerics.rotate(x, 0), x)
    assert numerics.rotate(x.bfloat16(), 128).dtype is BF16


def test_rotated_linear_is_near_the_full_one():
    """Activations are rotated as weights are: forgetting one of them gives noise."""
    x, w = normal(8, 384, spread=0.1), normal(64, 384, seed=1, spread=0.1)
    for name in (
        "int4_weight_only:hadamard",
        "mxfp4:hadamard",
        "nvfp4:hadamard",
        "nf4:hadamard",
        "int4_w4a8:hadamard",
    ):
        y = numerics.linear(x, numerics.quantize_weight(w, BUILTIN[name]), BUILTIN[name])
        full = x @ w.t()
        assert (y - full).norm() / full.norm() < 0.25, name
