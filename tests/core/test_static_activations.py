"""Stored scales of activations: codes of compressed-tensors, and what kernels do with them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.lifecycle.forward import quantize as quantize_by_library
from core_references import randn
from hypothesis import given, settings
from hypothesis import strategies as st

import quantport
from quantport import numerics
from quantport.errors import ConfigError, UnsupportedError, WeightError
from quantport.kernels import aten
from quantport.kernels.base import Accepted, Kernel, Rejected, Request, WeightSpec
from quantport.kernels.verdict import Claim, Evidence, Measurement
from quantport.kernels.wrapped import kernel_for
from quantport.loading.update import update_weight
from quantport.modules import QuantLinear
from quantport.numerics.sharding import join_shards, spans_shards, why_not_split
from quantport.scheme.catalog import BUILTIN

STATIC = ("int8:static", "int8:static_asym", "fp8_per_tensor:static", "int4_w4a8:static_asym")
N, K = 48, 256


def stored_as(name, n=N, k=K, zero=-17):
    scheme = BUILTIN[name]
    stored = numerics.quantize_weight(randn(n, k), scheme.per_token)
    stored["input_scale"] = torch.tensor([0.03125])
    if scheme.activation.zero_point:
        stored["input_zero_point"] = torch.tensor([zero], dtype=torch.int8)
    return scheme, stored


def arguments(quant):
    kind = "float" if quant.element.is_float8 else "int"
    return QuantizationArgs(
        num_bits=8, type=kind, symmetric=not quant.zero_point, strategy="tensor", dynamic=False
    )


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(STATIC),
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20),
    scale=st.floats(2.0**-100, 2.0**100, width=32),
    zero=st.integers(-128, 127),
)
def test_codes_and_values_are_those_of_the_library(name, values, scale, zero):
    quant, x, scale = BUILTIN[name].activation, torch.tensor([values]), torch.tensor([scale])
    point = torch.tensor([zero], dtype=torch.int8) if quant.zero_point else None
    codes, token = numerics.quantize_static(x, quant, scale, point)
    dtype = quant.element.storage
    theirs = quantize_by_library(x, scale, point, arguments(quant), dtype=dtype)
    assert torch.equal(numerics.raw(codes), numerics.raw(theirs))
    assert token.tolist() == [[scale.item()]]
    seen = numerics.static_values(x, quant, scale, point)
    assert torch.equal(seen, fake_quantize(x, scale, point, arguments(quant)))


@pytest.mark.parametrize("zero", [-1, 0, 1, 2])
def test_ties_go_to_even_codes(zero):
    """The zero point is added before: an odd one moves ties."""
    quant = BUILTIN["int8:static_asym"].activation
    x = torch.arange(-8, 9) / 2
    codes, _ = numerics.quantize_static(x[None], quant, torch.ones(1), torch.tensor([zero], dtype=torch.int8))
    assert codes[0].tolist() == [round(value + zero) for value in x.tolist()]


@pytest.mark.parametrize("name", STATIC)
def test_infinity_saturates_and_nan_shows(name):
    scheme, stored = stored_as(name)
    x = torch.ones(3, K)
    x[0, 0], x[1, 5] = torch.inf, torch.nan
    y = numerics.linear(x, stored, scheme)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert y[2].isfinite().all()


def test_names_and_layouts():
    scheme = BUILTIN["int8:tensor:static_asym"]
    assert scheme.per_token == BUILTIN["int8:tensor"]
    assert BUILTIN["int8"].per_token is BUILTIN["int8"]
    assert scheme.activations == "int8 per tensor, stored scale and zero point"
    assert scheme.bytes(N, K) == BUILTIN["int8:tensor"].bytes(N, K) + 5
    assert scheme.weight_only.layout(N, K) == BUILTIN["int8:tensor"].layout(N, K)


@pytest.mark.parametrize(
    "name",
    [
        "int8_weight_only:static",
        "fp8_per_tensor:static_asym",
        "mxfp8:static",
        "nvfp4:static",
        "q4_k:a8:static",
        "int8:static:static",
    ],
)
def test_schemes_without_such_activations_have_no_such_option(name):
    with pytest.raises(ConfigError) as caught:
        BUILTIN[name]
    assert caught.value.found == "no such option"


def test_nothing_is_quantized_to_it():
    with pytest.raises(ConfigError) as caught:
        numerics.quantize_weight(randn(4, 8), BUILTIN["int8:static"])
    assert caught.value.suggestion == "'int8'"


def run(kernel, name, x, bias=None, **more):
    scheme, stored = stored_as(name, **more)
    spec, runs = WeightSpec(scheme, N, K), kernel_for(kernel, scheme)
    packed = runs.pack(stored, spec)
    for key, tensor in runs.unpack(packed, spec).items():
        assert torch.equal(numerics.raw(tensor), numerics.raw(stored[key])), key
    return runs.run(x, packed, bias, spec), numerics.linear(x, stored, scheme, bias), stored


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("name", ["int8:static", "int8:static_asym", "int8:tensor:static_asym"])
def test_kernels_multiply_its_codes(name, rows):
    x, bias = randn(rows, K).bfloat16(), randn(N).bfloat16()
    for some in (None, bias):
        y, expected, _ = run(aten.IntMM(), name, x, some)
        assert y.dtype is torch.bfloat16
        assert float((y - expected).abs().max() / expected.abs().max()) < 2.0**-7


def test_a_token_of_zeros_gives_zeros():
    y, _, _ = run(aten.IntMM(), "int8:static_asym", torch.zeros(2, K))
    assert torch.equal(y, torch.zeros(2, N))


@pytest.mark.parametrize("name", STATIC)
def test_kernels_of_weights_alone_keep_the_scale(name):
    x = randn(3, K)
    y, _, stored = run(aten.Dequantize(), name, x)
    scheme = BUILTIN[name].weight_only
    weights = {key: tensor for key, tensor in stored.items() if not key.startswith("input")}
    assert torch.allclose(y, numerics.linear(x, weights, scheme), rtol=1e-5, atol=1e-5)


class Quantizes(Kernel):
    """A kernel that finds scales of tokens, and takes no codes."""

    name, quantizes_activations = "toy.quantizes", True

    def reasons_against(self, request):
        return ()

    def claim(self, request):
        return aten.DECLARED

    def run(self, x, packed, bias, spec):
        return numerics.linear(x, self.unpack(packed, spec), spec.scheme, bias)


def test_a_kernel_that_takes_no_codes_refuses():
    device = quantport.plugins.registry.default_registry().device("cpu")
    request = Request(WeightSpec(BUILTIN["int8:static"], N, K), "linear", device)
    refusal = Quantizes().verdict(request)
    assert isinstance(refusal, Rejected)
    assert "takes none that is stored" in str(refusal.reasons[0])
    for kernel in (aten.Reference(), aten.Dequantize()):
        verdict = kernel.verdict(request)
        assert isinstance(verdict, Accepted)
        assert verdict.speed is None
        assert verdict.precision == ("W8A8" if kernel.quantizes_activations else "W8A16")
    with pytest.raises(UnsupportedError, match="finds the scales of activations by itself"):
        kernel_for(Quantizes(), BUILTIN["int8:static"])
    with pytest.raises(UnsupportedError):
        Quantizes().run_codes(None, (), None, request.weight)


def test_it_goes_with_an_order_of_inputs():
    scheme, stored = stored_as("int4_w4a8:g32:actorder:static_asym")
    stored["weight_order"] = torch.randperm(K, generator=torch.Generator().manual_seed(1)).int()
    spec, x = WeightSpec(scheme, N, K), randn(4, K)
    plain = {key: t for key, t in stored.items() if key != "weight_order"}
    expected = numerics.linear(
        x[:, stored["weight_order"].long()], plain, BUILTIN["int4_w4a8:g32:static_asym"]
    )
    assert torch.equal(numerics.linear(x, stored, scheme), expected)
    runs = kernel_for(aten.Reference(), scheme)
    assert torch.equal(runs.run(x, runs.pack(stored, spec), None, spec), expected)


@pytest.mark.parametrize("name", STATIC)
def test_modules_hold_it(name):
    scheme, stored = stored_as(name)
    module = QuantLinear(aten.Reference(), WeightSpec(scheme, N, K), dtype=torch.float32)
    module.set_weight("", stored)
    x = randn(2, 3, K)
    y = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), y)
    empty = QuantLinear(aten.Reference(), WeightSpec(scheme, N, K), dtype=torch.float32)
    empty.load_state_dict(module.state_dict())
    module.repack(aten.Dequantize())
    for other in (empty, module, module.to(torch.bfloat16)):
        assert set(other.stored_weight()) == set(stored)
        for key, tensor in other.stored_weight().items():
            assert torch.equal(numerics.raw(tensor), numerics.raw(stored[key])), key


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused_by_modules(scale):
    scheme, stored = stored_as("int8:static")
    stored["input_scale"] = torch.tensor([scale])
    module = QuantLinear(aten.Reference(), WeightSpec(scheme, N, K), dtype=torch.float32)
    with pytest.raises(WeightError) as caught:
        module.set_weight("", stored)
    assert caught.value.found == f"input_scale {scale:g}"
    assert not module.state_dict()


def test_shards_share_it():
    scheme, stored = stored_as("int8:static_asym")
    halves = [{key: t.chunk(2)[i] if len(t) > 1 else t for key, t in stored.items()} for i in range(2)]
    joined = join_shards(halves, scheme, 0)
    assert all(torch.equal(joined[key], stored[key]) for key in stored)
    halves[1]["input_scale"] = torch.ones(1)
    with pytest.raises(WeightError, match="input_scale differs"):
        join_shards(halves, scheme, 0)


def test_offsets_and_fused_projections_are_split_as_without_it():
    for dim, name in ((0, "int8"), (0, "int8:asym"), (0, "int8:actorder"), (1, "int4_w4a8:g32:asym")):
        static = BUILTIN[f"{name}:static"]
        assert spans_shards(static, dim) == spans_shards(BUILTIN[name], dim) is False
        assert why_not_split(static, dim, 64) == why_not_split(BUILTIN[name], dim, 64)
    assert spans_shards(BUILTIN["int8:static"], 1)


@pytest.mark.parametrize("name", STATIC)
def test_a_new_weight_keeps_the_scale_of_activations(name):
    scheme, stored = stored_as(name)
    module = QuantLinear(aten.Reference(), WeightSpec(scheme, N, K), dtype=torch.float32)
    module.set_weight("", stored)
    weight = 2 * randn(N, K)
    update_weight(module, "", weight)
    held = module.stored_weight("")
    for key, tensor in numerics.quantize_weight(weight, scheme.per_token).items():
        assert torch.equal(numerics.raw(held[key]), numerics.raw(tensor))
    for key in held.keys() & {"input_scale", "input_zero_point"}:
        assert torch.equal(held[key], stored[key])
    assert "input_scale" in held


def test_rotated_activations_have_no_stored_scale():
    for name in ("int4_w4a8:static:hadamard", "int4_w4a8:hadamard:static"):
        with pytest.raises(ConfigError, match="no such option"):
            BUILTIN[name]


def test_what_was_measured_with_other_scales_is_no_measurement():
    class Measured(aten.IntMM):
        def reasons_against(self, request):
            return ()

        def claim(self, request):
            proof = Measurement("f.json", "d", "2026-01-01", "c")
            return Claim(Evidence.MEASURED, "f.json", proof)

        def speed(self, request):
            return 2.0

    device = quantport.devices()[0]
    found = {
        name: Measured().verdict(Request(WeightSpec(BUILTIN[name], N, K), "linear", device))
        for name in ("int8", "int8:static")
    }
    assert (found["int8"].claim.evidence, found["int8"].speed) == (Evidence.MEASURED, 2.0)
    static = found["int8:static"]
    assert (static.claim.evidence, static.claim.proof, static.speed) == (Evidence.DECLARED, None, None)
