"""Whether a model fits: memory is read when it is needed, and plan and load say the same."""

from __future__ import annotations

import json

import pytest
from core_fakes import FakeKernel, Shape, device
from core_models import DENSE

import quantport
from quantport.cli.page import Line
from quantport.cli.plans import plan_page
from quantport.config import QuantConfig
from quantport.errors import BudgetError
from quantport.kernels.verdict import Status
from quantport.model.layers import find_layers
from quantport.planning.fit import advice, shortage
from quantport.planning.plan import make_plan
from quantport.plugins.registry import Registry
from quantport.scheme.catalog import BUILTIN


@pytest.fixture
def with_memory(monkeypatch):
    """Makes a registry whose processor has so many bytes free, whenever it is asked."""

    def registry_of(free):
        registry = Registry()
        monkeypatch.setattr(registry.backends["cpu"], "memory", lambda device: free())
        return registry

    return registry_of


def test_memory_is_read_for_each_plan(with_memory):
    """Not once for the process: another one may have taken it meanwhile."""
    left = iter([10**12, 5, 10**12])
    registry = with_memory(left.__next__)
    assert [quantport.plan(DENSE, "int8", registry=registry).fits for _ in range(3)] == [True, False, True]
    assert quantport.plan(DENSE, "int8", device="cpu:x86_amx", registry=registry).fits is None


@pytest.mark.parametrize("scheme", ["int8", "int4_weight_only", "int4_g32", "nf4"])
def test_what_does_not_fit_is_said_by_plan_as_by_load(with_memory, scheme):
    free = 600_000_000 if scheme == "int8" else 1000
    registry = with_memory(lambda: free)
    plan = quantport.plan(DENSE, scheme, registry=registry, budget="1GB")
    with pytest.raises(BudgetError) as caught:
        quantport.load(DENSE, scheme, registry=registry, budget="1GB")
    assert plan.fits is False
    assert caught.value.found == shortage(plan)
    said = [block.text for block in plan_page(plan).blocks if isinstance(block, Line)]
    assert any(line.startswith("does not fit") and advice(plan) in line for line in said)
    assert BUILTIN[scheme].name not in advice(plan)
    assert ("int4_mse" in advice(plan)) == (scheme == "int8")
    assert ("budget=" in advice(plan)) == (scheme == "int8")
    assert json.loads(plan.to_json())["fits"] is False


@pytest.mark.parametrize(("scheme", "advised"), [("int4_mse", False), ("int8", True)])
def test_what_was_asked_for_is_no_advice(scheme, advised):
    """Where rows are as short as here, groups make even the smallest scheme large."""
    kernels = (FakeKernel("acme.dequantize", Status.DEQUANTIZE),)
    layers = find_layers({"a.weight": Shape((32, 32))})
    plan = make_plan(layers, QuantConfig.parse(scheme, BUILTIN), device(), kernels, BUILTIN)
    assert plan.after > 0.6 * 32 * 32
    assert ("int4_mse" in advice(plan)) == advised
