"""Weights and activations, quantized by Triton kernels: byte for byte those of the reference."""

from dataclasses import replace

import pytest
import torch

from quantport.backend import numerics
from quantport.catalog import BUILTIN
from quantport_triton.quantize import quantize, serves, swizzled
from quantport_triton.weights import quantize_weight

OPTIONS = ["mxfp4:floor", "mxfp4:ceil", "mxfp4:rceil", "mxfp8:even", "mxfp8:rceil", "mxfp6_e2m3:even1", "mxfp6_e3m2:floor"]
WEIGHTS = [*BUILTIN, *OPTIONS]
ACTIVATIONS = {str(q) + q.scale + q.rule: q for q in (BUILTIN[name].activation for name in WEIGHTS) if q}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
DECLINED = ["q4_0", "q8_0", "q4_k", "q5_k", "q6_k", "bf16", "int4_hqq"]


def same(got, want):
    """Equal bytes; of NaN, only that both are."""
    assert got.dtype is want.dtype
    assert got.shape == want.shape
    if want.dtype.is_floating_point:
        bad = want.float().isnan()
        assert torch.equal(got.float().isnan(), bad)
        got, want = got.float()[~bad].view(torch.int32), want.float()[~bad].view(torch.int32)
    assert torch.equal(got, want)


def matrix(n, k, dtype, seed=0):
    """Rows from subnormal to huge ones, one of zeros, and one element that stands out."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, generator=generator)
    span = 8 if dtype is torch.float16 else 100
    x *= torch.exp2(torch.linspace(-span, span, n) if n > 1 else torch.zeros(1)).round()[:, None]
    x[n // 2] = 0
    x[-1, k // 2] *= 50
    return x.to(dtype)


def check_weight(weight, scheme):
    want, got = numerics.quantize_weight(weight, scheme), quantize_weight(weight, scheme)
    assert list(got) == list(want)
    for name in want:
        same(got[name], want[name])


def check_activations(x, quant):
    want = numerics.quantize_blocks(x, quant)
    got = quantize(x, quant)
    codes = want.codes if quant.element.bits == 8 else numerics.pack_bits(want.codes, quant.element.bits)
    same(got.codes, codes)
    same(got.scale, want.scale)
    if want.outer is not None:
        same(got.outer, want.outer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in WEIGHTS if name not in DECLINED and serves(BUILTIN[name].weight)])
def test_weights(name, dtype):
    check_weight(matrix(9, 1088, dtype), BUILTIN[name])
    check_weight(matrix(3, 77, dtype), BUILTIN[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations(quant, dtype):
    check_activations(matrix(9, 1088, dtype), quant)
    check_activations(matrix(3, 77, dtype), quant)
    check_activations(matrix(1, 1, dtype), quant)
