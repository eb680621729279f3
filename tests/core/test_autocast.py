"""Autocast: what goes into a quantized layer is cast as for ``torch.nn.Linear``, whichever kernel runs it."""

from __future__ import annotations

import copy

import pytest
import torch
from core_models import Tiny, made
from torch import nn

import quantport
from quantport import numerics
from quantport.kernels.base import Request, WeightSpec
from quantport.modules import QuantExperts, QuantFused, QuantLinear
from quantport.plugins.registry import default_registry
from quantport.scheme.catalog import BUILTIN

N, K = 64, 128
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REGISTRY = default_registry()


def kernels(scheme):
    spec = WeightSpec(BUILTIN[scheme], N, K)
    request = Request(spec, "linear", REGISTRY.device("cpu"))
    return [k for k in REGISTRY.kernels("cpu") if k.serves(spec.scheme) and not k.reasons_against(request)]


def layer(kernel, scheme, bias=True):
    torch.manual_seed(0)
    weight = torch.randn(N, K).bfloat16()
    bias = nn.Parameter(torch.randn(N).bfloat16()) if bias else None
    module = QuantLinear(kernel, WeightSpec(BUILTIN[scheme], N, K), bias)
    module.set_weight("", numerics.quantize_weight(weight, BUILTIN[scheme]))
    return module


CASES = [
    pytest.param(kernel, scheme, id=f"{kernel.name} {scheme}")
    for scheme in ("int8", "int4_weight_only", "fp8_per_channel", "fp8_weight_only", "nf4", "bf16")
    for kernel in kernels(scheme)
]


@pytest.mark.parametrize("rows", [5, 130])  # kernels run few rows and many by other code
@pytest.mark.parametrize(("kernel", "scheme"), CASES)
def test_every_kernel_gets_what_autocast_makes_of_the_activations(kernel, scheme, rows):
    module, plain = layer(kernel, scheme), nn.Linear(K, N)
    for stored in FLOATS:
        x = torch.randn(rows, K).to(stored)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                y = module(x)
                assert y.dtype is plain(x).dtype is dtype
            cast = copy.copy(module)
            cast._parameters = {"bias": nn.Parameter(module.bias.to(dtype))}
            assert torch.equal(y, cast(x.to(dtype)))


def test_without_autocast_nothing_is_cast():
    (kernel, *_) = kernels("int8")
    x = torch.randn(5, K)
    for context in (
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", torch.float16, enabled=False),
    ):
        with context:
            assert layer(kernel, "int8")(x).dtype is torch.float32


def test_fp64_is_not_cast():
    (kernel, *_) = kernels("int8_weight_only")
    x = torch.randn(2, K, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(kernel, "int8_weight_only")(x).dtype is torch.float64


def test_the_reference_stays_in_fp32():
    """Autocast does not reach into a kernel."""
    kernel = REGISTRY.kernel("torch.reference")
    module, x = layer(kernel, "int8"), torch.randn(5, K).bfloat16()
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), expected)


def test_parts_of_a_fused_layer_are_cast():
    (kernel, *_) = kernels("int8")
    specs = {name: WeightSpec(BUILTIN["int8"], N, K) for name in ("q", "k")}
    module = QuantFused(kernel, specs)
    for name in specs:
        module.set_weight(name, numerics.quantize_weight(torch.randn(N, K).bfloat16(), BUILTIN["int8"]))
    x = torch.randn(5, K)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), module(x.bfloat16()))


@pytest.mark.parametrize("scheme", ["int8", "int4_weight_only", "fp8_weight_only"])
def test_experts_are_cast_and_give_back_the_dtype_of_the_residual(scheme):
    (kernel, *_) = kernels(scheme)
    up, down = WeightSpec(BUILTIN[scheme], N, K), WeightSpec(BUILTIN[scheme], K, N)
    module = QuantExperts(kernel, up, down, 2, "silu")
    for name, spec in module.specs.items():
        weight = torch.randn(spec.n, spec.k).bfloat16() * 0.1
        module.set_weight(name, numerics.quantize_weight(weight, spec.scheme))
    x, index, weights = torch.randn(5, K), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, index, weights)
    assert y.dtype is torch.float32
    assert torch.equal(y, module(x.bfloat16(), index, weights).float())


def test_a_gradient_comes_back_in_the_dtype_of_the_activations():
    (kernel, *_) = kernels("int8")
    module, x = layer(kernel, "int8"), torch.randn(5, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    y.sum().backward()
    weight = numerics.dequantize_weight(module.stored_weight(), BUILTIN["int8"], K, torch.bfloat16)
    assert x.grad.dtype is torch.float32
    assert torch.equal(x.grad, (torch.ones(5, N).bfloat16() @ weight).float())
    assert module.bias.grad is not None


def test_compiled_layers_are_cast_alike():
    (kernel, *_) = kernels("int8")
    module, x = layer(kernel, "int8"), torch.randn(5, K)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(x), module(x))
        assert torch.equal(compiled(x), module(x))


def test_tensors_without_data_pass():
    model = made(Tiny)
    quantport.quantize_(model, "int8")
    model.to("meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert model.up(torch.empty(2, 32, device="meta", dtype=torch.bfloat16)).is_meta
