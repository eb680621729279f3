"""A layer gives a single row to the function that its kernel has for that, and all else to the kernel."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from quantport import numerics
from quantport.errors import ShapeError
from quantport.kernels.base import WeightSpec
from quantport.modules import QuantLinear
from quantport.plugins.registry import default_registry

N, K = 24, 64


@pytest.fixture
def calls(monkeypatch):
    """What the layer called, in order; the functions of its kernel return what ``torch.dequantize`` does."""
    kernel, found = default_registry().kernel("torch.dequantize"), []
    run = kernel.run

    def row_function(packed, spec):
        found.append("found")

        def function(x):
            found.append("row")
            if x.numel() != K:
                return None
            return run(x.reshape(1, K), packed, None, spec).view(*x.shape[:-1], N)

        return function

    monkeypatch.setattr(kernel, "row_function", row_function, raising=False)
    monkeypatch.setattr(kernel, "run", lambda *given: found.append("run") or run(*given))
    return found


def layer(scheme="int8_weight_only", bias=None):
    spec = WeightSpec(default_registry().schemes[scheme], N, K)
    module = QuantLinear(default_registry().kernel("torch.dequantize"), spec, bias)
    stored = numerics.quantize_weight(
        torch.randn(N, K, generator=torch.Generator().manual_seed(3)).bfloat16(), spec.scheme
    )
    module.set_weight("", stored)
    return module


def test_single_rows_of_any_rank(calls):
    module, x = layer(), torch.randn(3, K).bfloat16()
    many = module(x)
    calls.clear()
    for row in (x[:1], x[0], x[None, :1]):
        y = module(row)
        assert y.shape == (*row.shape[:-1], N)
        assert torch.equal(y.view(-1), many[0])
    assert calls == ["row"] * 3
    module(x)
    assert calls[3:] == ["row", "run"]


def test_it_is_found_anew_for_another_weight_or_kernel(calls):
    module, x = layer(), torch.randn(1, K).bfloat16()
    before = module(x)
    module.set_weight("", {k: torch.zeros_like(t) for k, t in module.stored_weight("").items()})
    assert not module(x).any()
    module.bind(module.kernel, {})
    module(x)
    assert calls == ["found", "row"] * 3
    assert before.any()


def test_what_is_more_than_a_call_goes_another_way(calls):
    module, x = layer(), torch.randn(1, K).bfloat16()
    module(x)
    calls.clear()
    y = x.clone().requires_grad_()
    module(y).sum().backward()
    assert y.grad.any()
    with torch.autocast("cpu", torch.bfloat16):
        module(x.float())
    torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    biased = layer(bias=torch.nn.Parameter(torch.ones(N).bfloat16()))
    assert torch.equal(biased(x), biased(x.expand(2, -1))[:1])
    layer("mxfp4:hadamard")(x)
    assert "row" not in calls
    with torch.no_grad():
        module(y)
    assert calls[-1] == "row"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_a_function_of_its_own(calls, duplicate):
    module, x = layer(), torch.randn(1, K).bfloat16()
    y = module(x)
    other = duplicate(module)
    module.set_weight("", {k: torch.zeros_like(t) for k, t in module.stored_weight("").items()})
    assert torch.equal(other(x), y)


@pytest.mark.parametrize("shape", [(), (1, K + 1), (1, 1)], ids=str)
def test_another_width_is_refused(shape):
    with pytest.raises(ShapeError):
        layer()(torch.ones(shape).bfloat16())
