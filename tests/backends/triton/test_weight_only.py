"""Weight-only multiplication in the interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantport import numerics
from quantport.kernels.base import WeightSpec
from quantport.scheme.catalog import BUILTIN
from quantport_triton.kernels.weight_only import TritonWeightOnly, dequantized
from quantport_triton.kernels.weights import FORMATS
from quantport_triton.tuned import tuned_kernel

KERNEL = TritonWeightOnly("cuda")
SCHEMES = [name for name, scheme in BUILTIN.items() if KERNEL.serves(scheme)]
STORED = [
    "int4_weight_only:fp16",
    "int4_weight_only:g32:fp32:asym",
    "int4_weight_only:channel:fp32:asym",
    "int8_weight_only:channel:fp32:asym",
    "int8_weight_only:g64:fp16",
]  # of checkpoints of others
OPTIONS = [*STORED, "nf4:double", "fp4:double", "mxfp4:floor", "nvfp4:mse", "int4_weight_only:hadamard"]


def weight(scheme, n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, k, generator=generator) * torch.logspace(-3, 1, n).view(-1, 1)
    values[n // 2] = 0
    spec = WeightSpec(BUILTIN[scheme], n, k)
    stored = numerics.quantize_weight(values.bfloat16(), spec.scheme)
    return stored, KERNEL.pack(stored, spec), spec


def activations(m, k, dtype, seed=1):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(y, x, stored, spec, bias=None):
    expected = numerics.linear(x, stored, spec.scheme.weight_only, bias).float()
    return ((y.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def test_it_is_for_every_format_but_those_of_gguf():
    left = {scheme.name for scheme in BUILTIN.values() if not KERNEL.serves(scheme)}
    assert left == {name for name in BUILTIN if name.startswith("q")} | {"bf16"}
    assert {BUILTIN[name].weight.format for name in SCHEMES} == set(FORMATS)


@pytest.mark.parametrize("scheme", [*SCHEMES, *OPTIONS])
@pytest.mark.parametrize(("n", "k"), [(72, 544), (33, 253), (1, 1)])
def test_the_values_of_a_weight_are_those_of_the_reference(scheme, n, k):
    stored, packed, spec = weight(scheme, n, k)
    for dtype in (torch.bfloat16, torch.float16):
        values = dequantized(torch.empty(0, k, dtype=dtype), packed, spec)
        assert (
            torch.equal(values, numerics.dequantize_weight(stored, spec.scheme, k, dtype))
            or spec.scheme.rotation
        )
    if spec.scheme.rotation:  # the activations are rotated, not the weight back
        plain = WeightSpec(BUILTIN["int4_weight_only"], n, k)
        assert torch.equal(values, numerics.dequantize_weight(stored, plain.scheme, k, dtype))


@pytest.mark.parametrize("scheme", [*SCHEMES, *STORED])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 72, 1056), (3, 33, 253), (17, 130, 264), (257, 65, 129)])
def test_products_are_those_of_the_reference(scheme, rows, n, k):
    stored, packed, spec = weight(scheme, n, k)
    for dtype, with_bias in ((torch.bfloat16, True), (torch.float16, False)):
        x = activations(rows, k, dtype)
        bias = activations(1, n, dtype, 2)[0] if with_bias else None
        y = KERNEL.run(x, packed, bias, spec)
        assert y.dtype is dtype
        assert y.shape == (rows, n)
        assert error(y, x, stored, spec, bias) <= KERNEL.tolerance


@pytest.mark.parametrize("rows", range(1, 40, 7))
def test_every_number_of_rows_has_a_kernel(rows):
    stored, packed, spec = weight("int4_weight_only_g32", 40, 96)
    x = activations(rows, 96, torch.bfloat16)
    assert error(KERNEL.run(x, packed, None, spec), x, stored, spec) <= KERNEL.tolerance


@pytest.mark.parametrize("target", ["cpu", "sm_75", "sm_90", "gfx942"])
def test_the_kernels_of_an_architecture(target):
    kernels = [tuned_kernel(target, "weight_only", rows) for rows in (1, 8, 16, 64, 256, 257, 100_000)]
    middle = ["gemv", "dequantize", "dequantize", "dequantize"] if target == "sm_75" else ["gemm"] * 4
    assert kernels == ["gemv", *middle, "dequantize", "dequantize"]


@pytest.mark.parametrize(
    "scheme", ["int8", "int4_mse", "nvfp4", "mxfp4_dualscale", "fp8_per_block", "fp8_per_tensor"]
)
def test_a_sum_that_is_split_is_the_same_every_time(scheme):
    stored, packed, spec = weight(scheme, 64, 4096)
    x = activations(4, 4096, torch.float16)
    first = KERNEL.run(x, packed, None, spec)
    assert torch.equal(first, KERNEL.run(x, packed, None, spec))
    assert error(first, x, stored, spec) <= KERNEL.tolerance


def test_no_rows_and_no_columns():
    _, packed, spec = weight("int4_weight_only", 40, 96)
    assert KERNEL.run(torch.empty(0, 96, dtype=torch.float16), packed, None, spec).shape == (0, 40)


@settings(max_examples=25, deadline=None)
@given(
    scheme=st.sampled_from(
        ["fp8_weight_only", "int8_weight_only", "int4_weight_only_g32", "int4_mse", "nvfp4", "mxfp6", "nf4"]
    ),
    rows=st.integers(1, 18),
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    magnitude=st.integers(-30, 12),
    seed=st.integers(0, 99),
)
def test_any_size_and_magnitude(scheme, rows, n, k, magnitude, seed):
    generator = torch.Generator().manual_seed(seed)
    spec = WeightSpec(BUILTIN[scheme], n, k)
    stored = numerics.quantize_weight(
        (torch.randn(n, k, generator=generator) * 2.0**magnitude).bfloat16(), spec.scheme
    )
    x = activations(rows, k, torch.bfloat16, seed)
    assert error(KERNEL.run(x, KERNEL.pack(stored, spec), None, spec), x, stored, spec) <= KERNEL.tolerance


def test_what_it_packs_is_what_is_stored():
    for scheme in SCHEMES:
        stored, packed, spec = weight(scheme, 9, 70)
        again = KERNEL.unpack(packed, spec)
        assert all(
            torch.equal(again[key].view(torch.uint8), t.view(torch.uint8)) for key, t in stored.items()
        )
    assert KERNEL.keeps_layout
