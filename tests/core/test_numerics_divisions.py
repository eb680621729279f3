"""Scales and factors are quotients that are rounded once, for every largest magnitude of 16 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantport.engine import default_registry
from quantport.kvcache import rows
from quantport.numerics import quantize_weight
from quantport.numerics.scales import EPS, TINY, global_factor
from quantport.scheme.catalog import BUILTIN
from quantport.scheme.formats import FORMATS

FINITE = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
FAST = [None, default_registry().backends["cpu"].quantize_weight]


def magnitudes(dtype):
    """Every positive finite number, those of fp16 as fp16."""
    return torch.arange(1, FINITE[dtype], dtype=torch.int16).view(dtype)


def quotient(a, b):
    """Of fp32, by way of fp64, which has more than twice as many bits: nothing is rounded twice."""
    with np.errstate(over="ignore"):
        return torch.from_numpy((np.float64(a) / np.float64(b)).astype(np.float32))


@pytest.mark.parametrize("dtype", FINITE, ids=str)
def test_the_outer_factor(dtype):
    amax = magnitudes(dtype).float()
    expected = quotient(2688.0, amax.clamp_min(TINY).numpy())
    found = global_factor(amax, FORMATS["e2m1"])
    assert torch.equal(found, torch.where(torch.isinf(expected), 1.0, expected))
    products = 2688 * quotient(1.0, amax.clamp_min(TINY).numpy())
    assert not torch.equal(found, products)


@pytest.mark.parametrize("fast", FAST, ids=["reference", "compiled"])
@pytest.mark.parametrize(
    ("name", "half_range"), [("int8", 127.5), ("fp8_per_channel", 448), ("int4_g32", 7.5)]
)
def test_scales_of_weights(name, half_range, fast):
    amax = magnitudes(torch.bfloat16)
    weight = torch.zeros(len(amax), 32, dtype=torch.bfloat16)
    weight[:, 3] = amax
    scale = quantize_weight(weight, BUILTIN[name], fast=fast)["weight_scale"]
    expected = quotient(amax.float().numpy(), half_range).to(scale.dtype)
    assert torch.equal(
        scale.flatten(), torch.where(expected == 0, torch.tensor(EPS).to(scale.dtype), expected)
    )


@pytest.mark.parametrize("dtype", FINITE, ids=str)
@pytest.mark.parametrize(
    ("name", "half_range"), [("fp8_e4m3", 448), ("fp8_e5m2", 57344), ("int8", 127.5), ("int4", 7.5)]
)
def test_scales_of_a_cache(name, half_range, dtype):
    amax = magnitudes(dtype)
    states = torch.zeros(len(amax), 32, dtype=dtype)
    states[:, 5] = amax
    scale = rows.encode(states, rows.cache_dtype(name))[:, -2:].contiguous().view(torch.bfloat16)
    expected = quotient(amax.float().numpy(), half_range).bfloat16()
    assert torch.equal(scale.flatten(), torch.where(expected == 0, EPS, expected.float()).bfloat16())
