"""quantize_: in memory, in place, wholly or not at all; and what a quantized module can do."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from core_models import MOE, SCHEMES, Moe, Tiny, ids, made, same_bits, same_state, snapshot, untouched
from core_references import check_parts, randn
from torch import nn
from torch.nn import functional as F

import quantport
from quantport import numerics
from quantport.errors import ConfigError, QuantportError, WeightError
from quantport.modules import QuantExperts, QuantLinear, QuantModule
from quantport.modules.handles import BoundWeight
from quantport.modules.ops import run_linear
from quantport.plugins.registry import Registry, default_registry
from quantport.scheme.catalog import BUILTIN


def quantized(scheme="int8", factory=Tiny, dtype=torch.bfloat16):
    model = made(factory, dtype)
    quantport.quantize_(model, scheme)
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_modules_hold_the_reference_weights(scheme):
    original, model = made(), quantized(scheme)
    for name in ("up", "down", "narrow", "moe.experts.1.gate_proj"):
        expected = numerics.quantize_weight(original.get_submodule(name).weight, BUILTIN[scheme])
        found = model.get_submodule(name).stored_weight()
        assert all(same_bits(found[key], tensor) for key, tensor in expected.items()), name
        assert {k: v.data_ptr() for k, v in found.items()}.keys() == expected.keys()
    assert model.up.bias is not None
    assert model.quantport_plan.quantized[0].requested_scheme == scheme


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(7, 1), (1, 7), (129, 32), (32, 129), (40, 24), (16, 64)], ids=str)
def test_outputs_are_those_of_the_reference(scheme, shape):
    """Whatever kernel was chosen, odd shapes included: within its own tolerance, and the same twice."""
    n, k = shape
    model = made(lambda: nn.ModuleDict({"a": nn.Linear(k, n)}))
    weight, bias = model["a"].weight.clone(), model["a"].bias.clone()
    choice = quantport.quantize_(model, scheme).quantized[0].choice
    effective = BUILTIN[scheme] if choice.precision.endswith("A8") else BUILTIN[scheme].weight_only
    stored = numerics.quantize_weight(weight, BUILTIN[scheme])
    for m in (1, 2, 12, 40):
        x = randn(m, k, seed=m, dtype=torch.bfloat16)
        expected = numerics.linear(x, stored, effective, bias).float()
        found = model["a"](x).float()
        tolerance = default_registry().kernel(choice.kernel).tolerance
        assert (found - expected).abs().max() <= tolerance * expected.abs().max() + 2.0**-8 * bias.abs().max()
        assert torch.equal(found, model["a"](x).float())


def poison(model, name="moe.experts.2.down_proj", value=float("nan")):
    model.get_submodule(name).weight[-1, -1] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_done_when_a_weight_fails(value):
    model = poison(made(), value=value)
    before = snapshot(model)
    with pytest.raises(WeightError) as caught:
        quantport.quantize_(model, "int8")
    check_parts(caught.value, "moe.experts.2.down_proj", "NaN or Inf", "nonfinite='zero'")
    untouched(model, before)
    quantport.quantize_(model, config={"scheme": "int8", "nonfinite": "zero"})
    assert model.moe.experts[2].down_proj.stored_weight()["weight"][-1, -1] == 0


def test_nothing_is_done_when_a_kernel_fails(monkeypatch):
    model = made()
    before, calls = snapshot(model), []
    kind = type(default_registry().kernel(quantport.plan(model, "int8").quantized[-1].choice.kernel))
    pack = kind.pack

    def broken(self, stored_weight, spec):
        calls.append(spec)
        if len(calls) == 5:
            raise MemoryError("no memory to pack")
        return pack(self, stored_weight, spec)

    monkeypatch.setattr(kind, "pack", broken)
    with pytest.raises((QuantportError, MemoryError), match="no memory to pack"):
        quantport.quantize_(model, "int8")
    untouched(model, before)
    assert torch.get_num_threads() > 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"scheme": "int9"}, ConfigError),
        ({"scheme": "int8", "config": {"ignore": ["nothing"]}}, ConfigError),
        ({"scheme": "int8", "config": "fp8"}, ConfigError),
        ({"scheme": "int8", "fallback": "maybe"}, ConfigError),
    ],
)
def test_nothing_is_done_when_the_plan_fails(options, error):
    model = made()
    before = snapshot(model)
    with pytest.raises(error) as caught:
        quantport.quantize_(model, **options)
    check_parts(caught.value)
    untouched(model, before)


def test_a_model_on_a_device_that_nobody_serves():
    with pytest.raises(QuantportError, match="meta"):
        quantport.quantize_(made().to("meta"), "int8")


def test_multihead_attention_is_left_alone_with_a_reason():
    def factory():
        return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    model, x = made(factory), randn(2, 5, 32, dtype=torch.bfloat16)
    plan = quantport.plan(model, "int8")
    with pytest.raises(QuantportError, match="no layer can be quantized"):
        quantport.quantize_(model, "int8")
    for name in ("linear1", "linear2"):  # torch's fast path reads their weights by itself
        assert plan.by_layer[name].requested_scheme or plan.by_layer[name].note
    assert "NonDynamicallyQuantizableLinear" in plan.by_layer["self_attn.out_proj"].note
    assert type(model.self_attn.out_proj).__name__ == "NonDynamicallyQuantizableLinear"
    full = made(factory)(x).float()
    assert (model(x).float() - full).norm() / full.norm() < 0.05


def test_a_layer_by_itself_cannot_be_replaced_and_that_is_said():
    """nn.Linear as the model: there is no parent that could hold another module."""
    model = nn.Linear(64, 64).bfloat16()
    before = snapshot(model)
    try:
        plan = quantport.quantize_(model, "int8")
    except QuantportError as error:
        check_parts(error)
        untouched(model, before)
    else:
        assert not plan.quantized, "the plan says int8, the module is what it was"


def test_a_module_that_stands_at_two_places():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(32, 32)
            self.b = self.a

    model = quantized("int8", Twice)
    assert model.b is model.a, "one layer at two names stays one layer"


def test_tied_weights_are_not_doubled():
    """A linear layer whose weight is also the embedding's: quantizing it would keep both copies."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(32, 40, bias=False)
            self.embed = nn.Embedding(40, 32)
            self.embed.weight = self.proj.weight

    model = made(Tied)
    with pytest.raises(QuantportError, match="tied"):
        quantport.quantize_(model, "int8")
    assert model.proj.weight is model.embed.weight


def test_other_modules_keep_their_hooks_and_mode():
    model = made().train()
    quantport.quantize_(model, "int8")
    assert model.training
    assert all(m.training for m in model.modules())


def test_transformers_experts_and_tokens_that_go_nowhere():
    experts = quantport.load(MOE, "int8").model.layers[0].mlp.experts
    assert isinstance(experts, QuantExperts)
    x, weights = randn(3, 256, dtype=torch.bfloat16), torch.ones(3, 1, dtype=torch.bfloat16)
    index = torch.tensor([[0], [8], [-1]])
    y = experts(x, index, weights)
    assert y[0].abs().sum() > 0
    assert y[1].abs().sum() == 0, "an entry at the number of experts goes nowhere"
    assert y[2].abs().sum() == 0, "an entry below 0 goes nowhere"
    assert experts(x[:0], index[:0], weights[:0]).shape == (0, 256)


def test_routing_by_hand():
    """One expert at a time, in float32, against the loop that anyone would write."""
    model = quantport.load(MOE, "int8_weight_only").model.layers[0].mlp.experts.float()
    x, index = randn(7, 256), torch.randint(0, 8, (7, 2), generator=torch.Generator().manual_seed(1))
    weights = torch.rand(7, 2, generator=torch.Generator().manual_seed(2))
    expected = torch.zeros(7, 256)
    for t in range(7):
        for j in range(2):
            gate, up, down = (
                numerics.dequantize_weight(
                    model.stored_weight(f"{index[t, j]}.{p}"), BUILTIN["int8_weight_only"], k
                )
                for p, k in (("gate_proj", 256), ("up_proj", 256), ("down_proj", 160))
            )
            expected[t] += weights[t, j] * (down @ (F.silu(gate @ x[t]) * (up @ x[t])))
    found = model(x, index, weights)
    assert (found - expected).abs().max() / expected.abs().max() < 2.0**-6


def test_kernels_get_contiguous_matrices():
    """The contract of Kernel.run: [M, K], contiguous; whatever the caller holds."""
    seen = []

    class Look:
        def apply(self, x, packed, bias, spec):
            seen.append((x.dim(), x.is_contiguous(), x.shape[1]))
            return x.new_zeros(x.shape[0], spec.n)

    spec = quantized().up.spec
    for x in (
        randn(32, 5).t(),
        randn(2, 3, 40)[..., :32],
        randn(32),
        randn(5, 32),
        randn(4, 2, 3, 32).transpose(0, 1),
    ):
        assert run_linear(BoundWeight(Look(), spec, ""), x, (), None).shape == (*x.shape[:-1], 129)
    assert set(seen) == {(2, True, 32)}


@pytest.mark.parametrize("scheme", ["int8", "fp8_per_block", "int4_g32"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies(scheme, how):
    model, tokens = quantized(scheme), torch.arange(12).view(2, 6)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = made(seed=1)
        quantport.quantize_(other, scheme)
        assert not torch.equal(other(tokens), model(tokens))
        assert not any(other.load_state_dict(model.state_dict()))
    same_state(other, model)
    assert torch.equal(other(tokens), model(tokens))
    if how != "state_dict":
        assert other.quantport_plan == model.quantport_plan
        assert other.up is not model.up
        other.up.stored_weight()["weight" if "int4" not in scheme else "weight_packed"].zero_()


def test_state_dict_refuses_another_scheme_shape_or_a_missing_part():
    model = quantized("int8")
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"up\.weight_scale"):
        model.load_state_dict({k: v for k, v in state.items() if k != "up.weight_scale"})
    with pytest.raises(RuntimeError, match="up"):
        model.load_state_dict(quantized("fp8").state_dict())
    with pytest.raises(RuntimeError, match="up"):
        model.load_state_dict({**state, "up.weight": state["up.weight"][:5]})


def test_moves_and_casts():
    model = quantized("int4_g32")
    before = model.state_dict()
    model.half()
    assert model.up.bias.dtype == torch.float16
    assert all(
        same_bits(t, before[n]) for n, t in model.state_dict().items() if n.endswith(("packed", "scale"))
    )
    assert model(torch.arange(4)[None]).dtype == torch.float16
    model.to("cpu")
    meta = copy.deepcopy(model).to("meta")
    state = model.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in meta.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in state.items()
    }
    assert all(t.is_meta for t in meta.state_dict().values())
    assert next(meta.up.buffers()).is_meta
    meta.to_empty(device="cpu").load_state_dict(model.state_dict())
    same_state(meta, model)


def test_a_move_that_fails_leaves_the_module_whole():
    model = quantized("int8").to("meta")
    shapes = {n: t.shape for n, t in model.state_dict().items()}
    for module in model.modules():
        if isinstance(module, QuantModule):
            module.registry = Registry(points=[])
    with pytest.raises(QuantportError):
        model.to_empty(device="cpu")
    assert {n: t.shape for n, t in model.state_dict().items()} == shapes


def test_repr_and_memory():
    model = quantized("int8")
    assert isinstance(model.up, QuantLinear)
    assert "32, 129, bias=True, scheme=int8" in repr(model.up)
    held = sum(b.nbytes for b in model.down.buffers())
    assert held >= 32 * 129
    assert not any("packed" in name for name in model.state_dict() if not name.endswith("weight_packed"))
    assert quantized("int8", lambda: nn.ModuleDict({"m": Moe()}))["m"](
        randn(2, 32, dtype=torch.bfloat16)
    ).shape == (2, 32)
    assert ids.shape == (2, 12)


@pytest.mark.parametrize("scheme", ["int8", "mxfp4", "int4_weight_only", "q4_k", "bf16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_activations_of_another_width_are_refused(scheme, compiled):
    """A kernel trusts the width, and would read past the end of a shorter row."""
    net = nn.Sequential(nn.Linear(96, 70)).bfloat16()
    quantport.quantize_(
        net,
        scheme if scheme != "bf16" else None,
        config={"targets": {"0": "bf16"}} if scheme == "bf16" else None,
    )
    run = torch.compile(net, backend="eager", fullgraph=True) if compiled else net
    for width in (95, 97, 64):
        with pytest.raises(RuntimeError, match="96"):
            run(torch.randn(3, width).bfloat16())
    assert net(torch.randn(3, 96).bfloat16()).shape == (3, 70)


def test_one_compiled_graph_serves_a_batch_that_equals_a_size_of_the_weight():
    layer = nn.Sequential(nn.Linear(256, 256, bias=False, dtype=torch.bfloat16))
    quantport.quantize_(layer, "int4_weight_only")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (2, 3, 256):  # each row of the weight has 2 scales
            x = torch.randn(rows, 256, dtype=torch.bfloat16)
            assert torch.equal(compiled(x), layer(x))
