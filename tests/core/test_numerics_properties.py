"""Properties of the numerics that hold for every input: error bound, idempotence, packing, the reference
linear.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from core_references import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from quantport import numerics
from quantport.scheme import Quant
from quantport.scheme.catalog import BUILTIN

SOME = settings(max_examples=60, deadline=None)
quants = st.builds(
    Quant,
    st.sampled_from(["e4m3fn", "int8", "int4", "e3m2", "e2m1"]),
    st.tuples(st.sampled_from([0, 1, 2, 5, 128]), st.sampled_from([0, 1, 3, 32, 128])),
    st.sampled_from(["fp32", "bf16"]),
)
QUANTIZED = [name for name, scheme in BUILTIN.items() if scheme.weight.format != "bf16"] + [
    "mxfp4:hadamard",
    "nf4:double",
]
floats = st.floats(-3.0000000054977558e38, 3.0000000054977558e38, width=32)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=floats).map(
    torch.from_numpy
)


# mantissa bits, exponent of the smallest normal
FLOATS = {
    "e4m3fn": (3, -6),
    "e3m2": (2, -2),
    "e2m1": (1, 0),
}


def values(codes: Tensor, quant: Quant) -> Tensor:
    """What codes stand for, fp64."""
    return numerics.decode(codes, quant.element).double()


def spread(scale: Tensor, shape: torch.Size, quant: Quant) -> Tensor:
    """The scale of every element, fp64."""
    wide = scale.double().repeat_interleave(quant.group_size or max(shape[1], 1), 1)
    return wide.repeat_interleave(quant.block_shape[0] or max(shape[0], 1), 0)[: shape[0], : shape[1]]


def half_step(value: Tensor, scale: Tensor, quant: Quant) -> Tensor:
    """Half of the distance between neighbouring codes: 1/2 for integers, 2**-m / 2 of the binade for
    a float.
    """
    if quant.format not in FLOATS:
        return 0.5 * scale
    mantissa, smallest = FLOATS[quant.format]
    exponent = torch.floor(torch.log2(value.abs().clamp(min=2.0**smallest)))
    return torch.exp2(exponent - mantissa - 1) * scale


@SOME
@given(matrices, quants)
def test_error_is_at_most_half_a_step(x, quant):
    """amax / half_range reaches exactly half a step above the largest integer code, so saturation costs no
    more.
    """
    codes, scale = numerics.quantize(x, quant)
    value, wide = values(codes, quant), spread(scale, x.shape, quant)
    # the scale is rounded (relative 2**-24 in fp32, 2**-9 in bf16; more among subnormals), x / scale by
    # 2**-24
    fine = quant.scale == "fp32"
    slack = (
        (2.0**-21 + 2.0**-149 / scale.double().min())
        if fine
        else (2.0**-8 + 2.0**-133 / scale.double().min())
    )
    bound = half_step(value, wide, quant) * (1 + slack) + quant.element.high * scale.double().max() * slack
    assert ((x.double() - value * wide).abs() <= bound).all()


@SOME
@given(matrices, quants)
def test_quantizing_the_dequantized_value_gives_the_same_codes(x, quant):
    codes, scale = numerics.quantize(x, quant)
    if scale.min() < 2.0**-120 or not (values(codes, quant).abs().max() * scale.double().max() < 3.4e38):
        return  # code * scale is not exact enough among subnormals
    again, _ = numerics.quantize(numerics.dequantize(codes, scale, quant), quant, scale)
    assert torch.equal(values(again, quant), values(codes, quant))


@SOME
@given(matrices, quants)
def test_scales_are_positive_finite_and_codes_in_range(x, quant):
    codes, scale = numerics.quantize(x, quant)
    assert scale.shape == quant.scale_shape(*x.shape)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert values(codes, quant).abs().max() <= -quant.element.low


@SOME
@given(matrices, st.sampled_from(["int8", "int4", "e4m3fn"]))
def test_rows_are_independent_per_channel(x, form):
    codes, scale = numerics.quantize(x, Quant(form, (1, 0)))
    for i in range(x.shape[0]):
        row, own = numerics.quantize(x[i : i + 1], Quant(form, (1, 0)))
        assert torch.equal(row.float(), codes[i : i + 1].float())
        assert torch.equal(own, scale[i : i + 1])


@SOME
@given(matrices, quants)
def test_power_of_two_scaling_moves_only_the_scale(x, quant):
    x = x.clamp(-1e6, 1e6)
    x[x.abs() < 1e-20] = 0
    codes, scale = numerics.quantize(x, quant)
    doubled, scales = numerics.quantize(x * 4, quant)
    live = scale != 2.0**-23  # a block of zeros keeps its own scale
    assert torch.equal(doubled.float(), codes.float())
    assert torch.equal(scales[live], scale[live] * 4)


@SOME
@given(
    hnp.arrays(
        np.int8,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=20),
        elements=st.integers(-8, 7),
    )
)
def test_int4_packing_round_trip(array):
    codes = torch.from_numpy(array)
    packed = numerics.pack_int4(codes)
    assert packed.dtype == torch.int32
    assert packed.shape == (codes.shape[0], -(-codes.shape[1] // 8))
    assert torch.equal(numerics.unpack_int4(packed, codes.shape[1]), codes)


def test_int4_packing_by_hand():
    """Codes + 8 in hex, low nibble first: -8 -> 0, -7 -> 1, ... so eight codes -8..-1 make 0x76543210; the
    tail is 0.
    """
    codes = torch.arange(-8, 2, dtype=torch.int8)[None]
    assert [v & 0xFFFFFFFF for v in numerics.pack_int4(codes)[0].tolist()] == [0x76543210, 0x00000098]


def test_int4_packing_takes_views():
    codes = torch.randint(-8, 8, (16, 8), dtype=torch.int8)
    assert torch.equal(numerics.unpack_int4(numerics.pack_int4(codes.t()), 16), codes.t())
    wide = numerics.pack_int4(codes).repeat(1, 4)
    assert torch.equal(numerics.unpack_int4(wide[:, ::4], 8), codes)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("shape", [(1, 64, 48), (5, 129, 7), (3, 1, 704), (0, 64, 48), (2, 704, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference_linear_against_float64(name, shape, dtype):
    m, k, n = shape
    scheme = BUILTIN[name]
    x, weight, bias = randn(m, k, dtype=dtype), randn(n, k, seed=1), randn(n, seed=2, dtype=dtype)
    stored = numerics.quantize_weight(weight, scheme)
    y = numerics.linear(x, stored, scheme, bias)
    assert y.dtype == dtype
    assert y.shape == (m, n)
    given = numerics.quantized_values(numerics.rotate(x, scheme.rotation), scheme.activation).double()
    stored_values = numerics.dequantize_weight(stored, replace(scheme, rotation=0), k).double()
    exact = given @ stored_values.t() + bias.double()
    size = given.abs() @ stored_values.abs().t() + bias.double().abs()
    rounding = torch.finfo(dtype).eps * exact.abs() + k * 2.0**-23 * size
    assert ((y.double() - exact).abs() <= rounding).all()


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_linear_is_near_the_full_one(name):
    """Within so much of the norm, by bits: a wrong scale or order of nibbles is far off."""
    scheme = BUILTIN[name]
    x, weight = randn(16, 512), randn(256, 512, seed=1)
    y = numerics.linear(x, numerics.quantize_weight(weight, scheme), scheme)
    full = x @ weight.t()
    bound = {2: 0.35, 3: 0.2, 4: 0.15, 5: 0.08, 6: 0.08, 8: 0.05}[scheme.weight.element.bits]
    if scheme.weight.format in ("e2m1", "fp4"):
        bound = 0.25
    assert (y - full).norm() / full.norm() < bound
