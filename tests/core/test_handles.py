"""Handles of operators, and registries that are passed in: what a layer needs, it is given."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from core_fakes import FakeBackend, FakeKernel, device, plugin
from core_models import MOE, made
from core_references import check_parts, randn
from torch import nn

import quantport
from quantport.backend import GroupedKernel, loop_over_groups, numerics
from quantport.errors import BackendError, ConfigError
from quantport.kernels.base import WeightSpec
from quantport.modules import QuantExperts, QuantLinear, expert_layout, handles
from quantport.modules.expert_layout import bind_experts, resolve_experts
from quantport.plugins.registry import Registry, default_registry
from quantport.scheme import Quant, Scheme
from quantport.scheme.catalog import BUILTIN

MINE = Scheme("mine", Quant("int8", (1, 0)), None, "")


class Tiny(GroupedKernel):
    """Any weight, dequantized; in a registry of its own."""

    name = "tiny.k"

    def reasons_against(self, request):
        return ()

    def claim(self, request):
        return FakeKernel("").claim(request)

    def run(self, x, packed, bias, spec):
        weight = numerics.dequantize_weight(self.unpack(packed, spec), spec.scheme, spec.k, x.dtype)
        return nn.functional.linear(x, weight, bias)

    def run_grouped(self, x, offsets, stack, bias, spec, shared=1):
        return loop_over_groups(
            lambda rows, weight, part: self.run(rows, weight, part, spec),
            x,
            offsets.tolist(),
            lambda g, j: self.expert_view(stack, g, j),
            bias,
            spec.n,
            shared,
        )


@pytest.fixture
def registry(monkeypatch):
    """A registry with a device, a kernel and a scheme that the process's own does not have."""
    backend = FakeBackend("toy", "cpu", 20, [device("toy", torch_type="cpu")], [Tiny()])
    hooks = {"quantport_backend": lambda: backend, "quantport_schemes": lambda: [MINE]}
    return Registry([plugin(monkeypatch, "toy", **hooks)])


def linear(kernel, scheme, registry=None):
    module = QuantLinear(kernel, WeightSpec(scheme, 32, 64), registry=registry)
    module.set_weight("", numerics.quantize_weight(randn(32, 64, dtype=torch.bfloat16), scheme))
    return module.eval()


def test_a_handle_says_what_it_stands_for():
    module = linear(default_registry().kernel("torch.dequantize"), BUILTIN["int8_weight_only"])
    bound = module.bound[""]
    assert bound.handle == "torch.dequantize|int8_weight_only|32x64"
    assert bound.portable
    assert handles.resolve(bound.handle) is bound
    again = linear(module.kernel, BUILTIN["int8_weight_only"])
    assert again.bound[""] is bound, "equal layers share a graph"


def test_names_may_hold_what_separates_the_parts():
    scheme = BUILTIN["int4_weight_only:hadamard"]
    kernel = default_registry().kernel("torch.dequantize")
    bound = handles.bind(kernel, WeightSpec(scheme, 32, 64), default_registry())
    assert handles._parsed(bound.handle).spec == bound.spec
    strange = FakeKernel("a|b;c=d")
    handle = handles.bind(strange, WeightSpec(scheme, 32, 64), default_registry()).handle
    assert handle.count("|") == 3
    assert not {";", "="} & set(handle)


def test_a_handle_of_another_process_is_bound_again():
    handle = "torch.dequantize|nf4:double|48x64"
    handles._PORTABLE.pop(handle, None)
    bound = handles.resolve(handle)
    assert (bound.kernel.name, bound.spec.scheme.name, bound.spec.n) == ("torch.dequantize", "nf4:double", 48)
    assert handles.resolve(handle) is bound


@pytest.mark.parametrize(
    ("handle", "error", "named"),
    [
        ("npx.int8|int8|32x64", BackendError, "npx.int8"),
        ("tiny.k|int8|32x64|0123abcd", BackendError, "tiny.k"),
        ("torch.dequantize|int9|32x64", ConfigError, "int9"),
        ("torch.dequantize|int8", BackendError, "no handle"),
        ("", BackendError, "no handle"),
    ],
)
def test_what_this_process_lacks_is_refused_by_name(handle, error, named):
    with pytest.raises(error) as caught:
        torch.ops.quantport.linear(torch.ones(1, 64), [torch.ones(1)], None, handle)
    check_parts(caught.value, named)
    with pytest.raises(error) as caught:
        resolve_experts(f"silu;4;{handle};{handle}")
    check_parts(caught.value)


def test_a_compiled_program_runs_in_another_process(tmp_path):
    module, x = (
        linear(default_registry().kernel("torch.dequantize"), BUILTIN["int8_weight_only"]),
        randn(3, 64),
    )
    torch.export.save(torch.export.export(module, (x.bfloat16(),)), tmp_path / "program.pt2")
    torch.save((x.bfloat16(), module(x.bfloat16())), tmp_path / "data.pt")
    code = (
        "import sys, torch, quantport.modules.ops\n"
        "x, y = torch.load(sys.argv[2])\n"
        "assert torch.equal(torch.export.load(sys.argv[1]).module()(x), y)"
    )
    files = [str(tmp_path / "program.pt2"), str(tmp_path / "data.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True)


def test_a_kernel_of_another_registry_runs_compiled_and_is_forgotten(registry):
    module, x = linear(registry.kernel("tiny.k"), MINE, registry), randn(5, 64, dtype=torch.bfloat16)
    handle = module.bound[""].handle
    assert handle == f"tiny.k|mine|32x64|{registry.token}"
    torch._dynamo.reset()
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
    torch._dynamo.reset()
    other = FakeKernel("tiny.k")
    assert handles.bind(other, module.spec, registry).handle not in ("", handle), (
        "another kernel of this name"
    )
    del module
    with pytest.raises(BackendError):
        handles.resolve(handle)


def test_models_are_planned_and_quantized_by_a_registry_that_is_passed_in(registry, tmp_path):
    with pytest.raises(ConfigError):
        quantport.plan(made(), "mine")
    assert quantport.plan(made(), "mine", registry=registry).quantized[0].choice.kernel == "tiny.k"
    model = made()
    quantport.quantize_(model, "mine", registry=registry)
    modules = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert {(m.kernel.name, m.scheme, m.registry) for m in modules} == {("tiny.k", "mine", registry)}
    loaded = quantport.load(MOE, "mine", registry=registry)
    experts = loaded.model.layers[0].mlp.experts
    assert isinstance(experts, QuantExperts)
    assert (experts.kernel.name, experts.registry) == ("tiny.k", registry)
    folder = quantport.save(loaded, tmp_path / "saved")
    again = quantport.load(folder, registry=registry).model.layers[0].mlp.experts
    assert torch.equal(
        again.stored_weight("3.up_proj")["weight"], experts.stored_weight("3.up_proj")["weight"]
    )
    assert {cell.choice.kernel for cell in quantport.matrix("mine", registry=registry)} == {"tiny.k"}
    twin = copy.deepcopy(modules[0])
    assert (twin.registry, twin.kernel) == (registry, modules[0].kernel)
    moved = twin.to("meta").to_empty(device="cpu")
    assert moved.kernel.name == "tiny.k", "it chooses where it came from"


def test_a_pickled_module_finds_its_kernel_in_the_registry_of_the_process(registry):
    module = linear(registry.kernel("tiny.k"), MINE, registry)
    with pytest.raises(BackendError, match=r"tiny\.k"):
        pickle.loads(pickle.dumps(module))
    own = linear(default_registry().kernel("torch.dequantize"), BUILTIN["int8_weight_only"])
    assert pickle.loads(pickle.dumps(own)).registry is default_registry()


def test_layouts_of_experts_are_bound_again():
    kernel, other = (default_registry().kernel(n) for n in ("torch.dequantize", "torch.reference"))
    up, down = (
        WeightSpec(BUILTIN["int8_weight_only"], 32, 64),
        WeightSpec(BUILTIN["int8_weight_only"], 64, 32),
    )
    module = QuantExperts(kernel, up, down, 4, "silu", others={"2.down_proj": (other, BUILTIN["int8"])})
    layout = module.layout
    assert [(g.name, g.first, g.last) for g in layout.groups] == [
        ("gate_up_0", 0, 4),
        ("down_0", 0, 2),
        ("down_2", 2, 3),
        ("down_3", 3, 4),
    ]
    assert bind_experts(module.bound, module.form) is layout
    del expert_layout._PORTABLE[layout.handle]
    again = resolve_experts(layout.handle)
    assert again is not layout
    assert again.groups == layout.groups
