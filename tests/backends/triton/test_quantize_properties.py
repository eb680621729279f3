"""Arithmetic of the quantization kernels, against other libraries and over arbitrary bits."""

from importlib import import_module

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from quantport.backend import FORMATS, numerics
from quantport.numerics.scales import scale_values
from quantport.scheme.catalog import BUILTIN
from quantport_triton.launch import Config, launch
from quantport_triton.ops import encode as ops
from quantport_triton.quantize import quantize
from quantport_triton.weights import quantize_weight

JUDGES = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
SEARCHED = ["int4_mse", "mxfp4_dualscale", "mxfp4:mse", "mxfp8:mse", "nvfp4:mse"]
PLAIN = [
    "fp8_per_tensor",
    "fp8_per_channel",
    "fp8_per_block",
    "int8",
    "int4_weight_only_g32",
    "fp6",
    "nf4",
    "fp4",
    "nvfp4",
    "mxfp8",
    "mxfp4",
    "mxfp4:floor",
    "mxfp4:ceil",
    "mxfp4:rceil",
    "mxfp6_e2m3",
    "mxfp6_e3m2:rceil",
]


@triton.jit
def _encode(x, codes, size, FORMAT: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < size, other=0)
    tl.store(codes + place, ops.encode(value, value, FORMAT).to(tl.uint8), mask=place < size)


@triton.jit
def _divide(x, y, out, size, BLOCK: tl.constexpr):  # noqa: N803
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    quotient = ops.divide(tl.load(x + place, mask=inside, other=0), tl.load(y + place, mask=inside, other=1))
    tl.store(out + place, quotient, mask=inside)


def encoded(x, name):
    codes = torch.empty(x.shape, dtype=torch.uint8)
    tensors = {"x": x, "codes": codes}
    launch(
        _encode,
        (-(-x.numel() // 4096),),
        Config({"BLOCK": 4096}, fusion=False),
        tensors,
        {"size": x.numel()},
        FORMAT=name,
    )
    return codes


def boundaries(name):
    """Every value of a format, every midpoint of neighbours, and the fp32 neighbours of each, with both
    signs.
    """
    values = numerics.values_of(name).unique()
    values = values[values.isfinite()]
    edges = torch.cat((values, (values[1:] + values[:-1]) / 2, torch.tensor([0.0, 1e-45, 1e-38, 3e38, 1e4])))
    around = [edges, *(torch.nextafter(edges, torch.tensor(end)) for end in (float("-inf"), float("inf")))]
    return torch.cat([*around, *(-a for a in around)])


@pytest.mark.parametrize("name", JUDGES)
def test_small_floats_against_ml_dtypes(name):
    x = boundaries(name)
    high = FORMATS[name].high
    want = x.clamp(-high, high).numpy().astype(JUDGES[name]).view(np.uint8)
    assert np.array_equal(encoded(x, name).numpy(), want)


@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "fp4"])
def test_the_other_formats_against_the_reference(name):
    x = boundaries(name)
    want = numerics.encode(x.clone(), FORMATS[name])
    assert torch.equal(encoded(x, name), (want + 8 if name == "int4" else want).view(torch.uint8))


def test_quotients_are_correctly_rounded():
    generator = torch.Generator().manual_seed(0)
    for spread in (0, 40, 126):
        y = torch.rand(1 << 16, generator=generator) + 1
        x = (torch.rand(1 << 16, generator=generator) + 1) * torch.exp2(
            torch.randint(-11, 8, (1 << 16,), generator=generator)
        )
        shift = torch.exp2(
            torch.randint(-spread, min(spread, 118) + 1, (1 << 16,), generator=generator).float()
        )
        x, y = x * shift, y * shift
        out = torch.empty_like(x)
        launch(
            _divide,
            (16,),
            Config({"BLOCK": 4096}, fusion=False),
            {"x": x, "y": y, "out": out},
            {"size": x.numel()},
        )
        assert torch.equal(out, x / y)


@st.composite
def matrices(draw):
    """Arbitrary finite values, a narrow or a wide range of exponents, some zeros, a few odd shapes."""
    n, k = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 31, 64, 130, 520]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    bits = torch.randint(0, 1 << 16, (n, k), generator=generator, dtype=torch.int32)
    low = draw(st.integers(0, 254))
    span = draw(st.sampled_from([1, 4, 255]))
    exponent = (torch.randint(0, span, (n, k), generator=generator, dtype=torch.int32) + low).clamp(max=254)
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    if dtype is torch.float16:
        x = ((bits & 0x83FF) | ((exponent % 31) << 10)).to(torch.int16).view(dtype)
    else:
        x = (bits << 16 & -0x7F810000) | exponent << 23
        x = (x | bits * 37 % (1 << 16) if dtype is torch.float32 else x).view(torch.float32).to(dtype)
    zeros = torch.rand(n, k, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return x.masked_fill(zeros, -0.0 if draw(st.booleans()) else 0.0)


def check_weight(x, scheme):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("quantport.numerics.linear"), "check_finite", lambda *_: None)
        want = numerics.quantize_weight(x, scheme)
    got = quantize_weight(x, scheme)
    finite = [scale_values(stored["weight_scale"], scheme.weight.scale).isfinite() for stored in (got, want)]
    assert torch.equal(*finite)
    for name in want if finite[1].all() else ():
        assert torch.equal(got[name].flatten().view(torch.uint8), want[name].flatten().view(torch.uint8)), (
            name
        )


@given(matrices(), st.sampled_from(PLAIN))
@settings(max_examples=150, deadline=None)
def test_weights_of_any_bits(x, name):
    check_weight(x, BUILTIN[name])


@given(matrices(), st.sampled_from(SEARCHED))
@settings(max_examples=60, deadline=None)
def test_searched_weights_of_any_bits(x, name):
    check_weight(x, BUILTIN[name])


@given(
    matrices(),
    st.sampled_from(
        ["fp8", "int8", "fp8_per_block", "mxfp8", "mxfp4:rceil", "nvfp4", "mxfp4_dualscale", "mxfp6"]
    ),
)
@settings(max_examples=80, deadline=None)
def test_activations_of_any_bits(x, name):
    quant = BUILTIN[name].activation
    blocks, got = numerics.quantize_blocks(x, quant), quantize(x, quant)
    packed = blocks.codes if quant.element.bits == 8 else numerics.pack_bits(blocks.codes, quant.element.bits)
    for tensor, want in ((got.codes, packed), (got.scale, blocks.scale), (got.outer, blocks.outer)):
        assert want is None or torch.equal(
            tensor.flatten().view(torch.uint8), want.flatten().view(torch.uint8)
        )
