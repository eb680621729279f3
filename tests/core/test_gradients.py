"""Gradients through quantized layers: those of the dequantized weight, and nothing to pay for where none is
asked for.
"""

from __future__ import annotations

import copy

import pytest
import torch
from core_models import MOE, SCHEMES, made
from core_references import check_parts, randn
from torch import nn

import quantport
from quantport import numerics
from quantport.errors import NoTensorError
from quantport.kernels.base import WeightSpec
from quantport.modules import QuantExperts, QuantLinear, ops
from quantport.plugins.registry import default_registry
from quantport.scheme.catalog import BUILTIN


def layer(scheme="int8", dtype=torch.float32, n=48, k=96):
    model = made(lambda: nn.ModuleDict({"a": nn.Linear(k, n)}), dtype)
    quantport.quantize_(model, scheme)
    return model["a"]


def dense(module: QuantLinear, dtype=torch.float32) -> torch.Tensor:
    return numerics.dequantize_weight(
        module.stored_weight(), BUILTIN[module.scheme], module.in_features, dtype
    )


@pytest.mark.parametrize(
    "scheme", [*SCHEMES, "mxfp4", "nvfp4", "nf4:double", "int4_mse", "q6_k", "mxfp4:hadamard"]
)
@pytest.mark.parametrize("shape", [(5, 96), (2, 3, 96)], ids=str)
def test_the_gradient_is_that_of_the_dequantized_weight(scheme, shape):
    """Whatever the kernel computes forward, quantized activations included: they are passed straight
    through.
    """
    module = layer(scheme)
    x = randn(*shape).requires_grad_()
    module.bias.requires_grad_()
    y = module(x)
    assert torch.equal(y, module(x.detach()))
    grad = randn(*y.shape, seed=3)
    y.backward(grad)
    assert torch.allclose(x.grad, grad @ dense(module), atol=1e-5)
    assert torch.allclose(module.bias.grad, grad.reshape(-1, 48).sum(0), atol=1e-5)


def test_gradients_meet_finite_differences():
    """An independent judge: a weight-only layer is linear, so differences of its outputs are exact but for
    rounding.
    """
    module = layer("int8_weight_only", torch.float32)
    x, direction, grad = randn(3, 96).requires_grad_(), randn(3, 96, seed=1), randn(3, 48, seed=2)
    module(x).backward(grad)
    with torch.no_grad():
        difference = ((module(x + direction) - module(x - direction)) / 2 * grad).sum()
    assert torch.allclose((x.grad * direction).sum(), difference, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_have_the_dtype_of_the_activations(dtype):
    module = layer("fp8_per_block", dtype)
    x = randn(4, 96).to(dtype).requires_grad_()
    module(x).sum().backward()
    assert x.grad.dtype == dtype
    expected = torch.ones(4, 48) @ dense(module)
    assert (x.grad.float() - expected).abs().max() <= 2.0**-6 * expected.abs().max()


@pytest.mark.parametrize("scheme", ["int8", "int4_weight_only"])
def test_compiled_gradients_are_the_same(scheme):
    module = layer(scheme)
    x, again = (randn(4, 96).requires_grad_() for _ in range(2))
    module(x).sum().backward()
    torch._dynamo.reset()
    torch.compile(module, fullgraph=True, backend="aot_eager")(again).sum().backward()
    assert torch.allclose(x.grad, again.grad, atol=1e-6)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_has_a_gradient_though_it_was_traced_without(strict):
    module = layer("int8").requires_grad_(False)
    program = torch.export.export(module, (randn(4, 96),), strict=strict).module()
    x = randn(4, 96).requires_grad_()
    program(x).sum().backward()
    given, x.grad = x.grad, None
    module(x).sum().backward()
    assert torch.equal(given, x.grad)


def test_without_a_gradient_the_kernel_is_called_as_it_is(monkeypatch):
    module, called = layer(), []
    monkeypatch.setattr(ops, "_run", lambda *args, real=ops._run: called.append("kernel") or real(*args))
    monkeypatch.setattr(torch.ops.quantport, "linear", lambda *a: pytest.fail("the operator was dispatched"))
    x = randn(2, 96)
    assert module(x).grad_fn is None
    with torch.no_grad():
        assert module(x.requires_grad_()).grad_fn is None
    assert called == ["kernel", "kernel"]


@pytest.fixture(scope="module", params=["int8_weight_only", "int4_weight_only:hadamard"])
def experts(request):
    model = quantport.load(MOE, request.param)
    return next(m for m in model.modules() if isinstance(m, QuantExperts))


def routed(experts):
    x = (randn(6, experts.gate_up.k) * 0.5).bfloat16()
    index = torch.arange(12).view(6, 2) % experts.num_experts
    return x, index, torch.softmax(randn(6, 2, seed=2), -1).bfloat16()


def test_gradients_go_through_experts(experts):
    x, index, weights = routed(experts)
    a, b = x.clone().requires_grad_(), x.float().requires_grad_()
    wa, wb = weights.clone().requires_grad_(), weights.float().requires_grad_()
    experts(a, index, wa).backward(torch.ones_like(a))
    table = {
        name: numerics.dequantize_weight(experts.stored_weight(name), s.scheme, s.k)
        for name, s in experts.specs.items()
    }
    out = torch.zeros_like(b)
    for t in range(6):
        for j in range(2):
            gate, up, down = (table[f"{int(index[t, j])}.{p}"] for p in ("gate_proj", "up_proj", "down_proj"))
            row = nn.functional.silu(b[t] @ gate.T) * (b[t] @ up.T) @ down.T * wb[t, j]
            out = out.index_add(0, torch.tensor([t]), row[None])
    out.backward(torch.ones_like(out))
    for found, expected in ((a.grad, b.grad), (wa.grad, wb.grad)):
        assert (found.float() - expected).norm() <= 0.02 * expected.norm()


def test_compiled_experts_refuse_a_gradient(experts):
    x, index, weights = routed(experts)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="gradient through compiled quantized experts") as caught:
        torch.compile(experts, backend="aot_eager")(x.requires_grad_(), index, weights).sum().backward()
    assert "without torch.compile" in str(caught.value)


@pytest.mark.parametrize("kernel", ["torch.dequantize", "cpu.int8_weight_only"])
@pytest.mark.parametrize("wanted", [None, "activations", "routing"])
def test_a_graph_of_experts_has_autograd_where_a_gradient_is_wanted(kernel, wanted):
    registry = default_registry()
    spec, down = (WeightSpec(registry.schemes["int8_weight_only"], *shape) for shape in ((32, 64), (64, 32)))
    module = QuantExperts(registry.kernel(kernel), spec, down, 2, "silu")
    for name, each in module.specs.items():
        module.set_weight(name, numerics.quantize_weight(randn(each.n, each.k).bfloat16(), each.scheme))
    x, index, weights = randn(3, 64).bfloat16(), torch.arange(6).view(3, 2) % 2, torch.ones(3, 2).bfloat16()
    given = (x.requires_grad_(wanted == "activations"), index, weights.requires_grad_(wanted == "routing"))
    called = []

    def look(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes if "quantport" in str(node.target))
        return graph

    torch._dynamo.reset()
    y = torch.compile(module, fullgraph=True, backend=look)(*given)
    program = torch.export.export(module, given)
    called += [str(node.target) for node in program.graph.nodes if "quantport" in str(node.target)]
    operator = "quantport.experts" if module.layout.one_launch else "quantport.experts_loop"
    assert [name.removesuffix(".default") for name in called] == [
        operator if wanted else f"{operator}_no_grad",
        operator,
    ]
    assert torch.equal(y, module(*given))
    assert y.requires_grad == bool(wanted)


@pytest.mark.parametrize("ask", ["data", "clone", "T", "device_mesh"])
def test_the_weight_is_no_tensor(ask):
    weight = layer().weight
    with pytest.raises(NoTensorError) as caught:
        getattr(weight, ask)
    check_parts(caught.value, ask, "16-bit")
    assert not hasattr(weight, ask)
    assert copy.deepcopy(weight).shape == weight.shape
    assert weight.shape == (48, 96)


def test_a_quantized_layer_is_a_linear_layer():
    module = layer()
    assert isinstance(module, nn.Linear)
    assert (module.in_features, module.out_features) == (96, 48)
    assert [name for name, _ in module.named_parameters(recurse=False)] == ["bias"]
