"""Fused layers: no scale spans two projections, on a tiny Phi-3."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from core_models import ids, made, same_bits, same_state, snapshot, untouched
from core_references import check_parts, randn
from safetensors.torch import save_file
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM

import quantport
from quantport import numerics
from quantport.errors import WeightError
from quantport.model.fused_projections import with_cuts
from quantport.model.layers import Layer, find_layers
from quantport.modules import QuantFused, QuantLinear
from quantport.numerics.sharding import spans_shards
from quantport.scheme.catalog import BUILTIN

SPANNING = ("fp8_per_tensor", "nvfp4", "nvfp4_weight_only", "nf4:double")
PARTS = {"q_proj": 128, "k_proj": 64, "v_proj": 64}  # heads of 32: four of queries, two of keys and of values
LAYER = "model.layers.0.self_attn.qkv_proj"
MLP = "model.layers.0.mlp.gate_up_proj"


def phi(**options):
    config = Phi3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        **options,
    )
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config).bfloat16().eval().requires_grad_(False)
    weight = model.get_submodule(LAYER).weight
    weight[:128] *= 30  # queries far larger than keys, keys than values
    weight[192:] /= 3000
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, path = phi(), tmp_path_factory.mktemp("phi3")
    save_file(
        {n: t.clone() for n, t in model.state_dict().items()},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    (path / "config.json").write_text(
        json.dumps({**model.config.to_dict(), "architectures": ["Phi3ForCausalLM"]})
    )
    return path


def alone(scheme, sizes=PARTS, name=LAYER):
    """The stored tensors of each projection, quantized as if it were a layer of its own."""
    parts = phi().get_submodule(name).weight.split(list(sizes.values()))
    return {p: numerics.quantize_weight(w, BUILTIN[scheme]) for p, w in zip(sizes, parts, strict=True)}


@pytest.mark.parametrize("scheme", SPANNING)
def test_each_projection_has_scales_of_its_own(folder, scheme, tmp_path):
    model = quantport.load(folder, scheme)
    for name, sizes in ((LAYER, PARTS), (MLP, {"gate_proj": 192, "up_proj": 192})):
        module = model.get_submodule(name)
        assert isinstance(module, QuantFused)
        for part, stored in alone(scheme, sizes, name).items():
            assert all(same_bits(module.stored_weight(part)[key], t) for key, t in stored.items())
    assert isinstance(model.model.layers[0].self_attn.o_proj, QuantLinear)
    step = quantport.plan(folder, scheme).by_layer[LAYER]
    assert step == model.quantport_plan.by_layer[LAYER]
    assert "q_proj, k_proj, v_proj" in step.note
    again = quantport.load(quantport.save(model, tmp_path / "out"))
    same_state(again, model)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.quantport_plan.after == model.quantport_plan.after
    here = phi()
    quantport.quantize_(here, scheme)
    same_state(here, model)


@pytest.mark.parametrize("scheme", SPANNING)
def test_one_scale_for_all_would_lose_the_small_projection(scheme):
    """Values far smaller than queries fall below the smallest codes that one scale has: what the issue in
    vLLM is about.
    """
    weight = phi().get_submodule(LAYER).weight
    one = numerics.dequantize_weight(numerics.quantize_weight(weight, BUILTIN[scheme]), BUILTIN[scheme], 128)
    each = torch.cat([numerics.dequantize_weight(s, BUILTIN[scheme], 128) for s in alone(scheme).values()])

    def error(found):
        return ((found - weight.float())[192:].norm() / weight.float()[192:].norm()).item()

    assert error(each) < 0.12
    assert error(one) > (1.3 if scheme.startswith("nvfp4") else 3) * error(each)


@pytest.mark.parametrize("scheme", [s for s in BUILTIN if not spans_shards(BUILTIN[s], 0)])
def test_scales_of_rows_and_blocks_are_those_of_the_projections_as_they_are(folder, scheme):
    """q ends at row 128 and k at 192, in the middle of a block of 128 rows: only there it makes a
    difference.
    """
    model = quantport.load(folder, scheme)
    module = model.get_submodule(LAYER)
    stored = alone(scheme)
    if scheme == "fp8_per_block":
        assert isinstance(module, QuantFused)
        assert all(
            same_bits(module.stored_weight(p)[key], t) for p, s in stored.items() for key, t in s.items()
        )
        return
    if scheme == "bf16":
        return
    assert isinstance(module, QuantLinear)
    for key, tensor in module.stored_weight().items():
        joined = torch.cat([s[key].view(torch.uint8) for s in stored.values()])
        assert torch.equal(tensor.view(torch.uint8), joined), key


def test_blocks_that_end_where_projections_end_stay_one_weight():
    model = phi(head_dim=128)
    weight = model.get_submodule(LAYER).weight.clone()
    assert weight.shape[0] == 1024
    quantport.quantize_(model, "fp8_per_block")
    module = model.get_submodule(LAYER)
    assert isinstance(module, QuantLinear)
    stored = [numerics.quantize_weight(w, BUILTIN["fp8_per_block"]) for w in weight.split([512, 256, 256])]
    assert same_bits(module.stored_weight()["weight_scale"], torch.cat([s["weight_scale"] for s in stored]))


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Linear(32, 48)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_outputs_gradients_copies_and_moves(dtype):
    model = made(Biased, dtype)
    weight, bias = model.gate_up_proj.weight.clone(), model.gate_up_proj.bias.clone()
    weight[24:] *= 50
    model.gate_up_proj.weight.copy_(weight)
    choice = quantport.quantize_(model, "fp8_per_tensor").quantized[0].choice
    module = model.gate_up_proj
    assert isinstance(module, nn.Linear)
    assert module.weight.shape == (48, 32)
    assert "gate_proj 24, up_proj 24" in repr(module)
    scheme = (
        BUILTIN["fp8_per_tensor"]
        if choice.precision.endswith("A8")
        else BUILTIN["fp8_per_tensor"].weight_only
    )
    x = randn(2, 3, 32).to(dtype).requires_grad_()
    y = module(x)
    for rows in (slice(0, 24), slice(24, 48)):
        stored = numerics.quantize_weight(weight[rows], scheme)
        expected = numerics.linear(x.detach().view(6, 32), stored, scheme, bias[rows]).view(2, 3, 24)
        assert (y[..., rows] - expected).abs().max() <= 2.0**-6 * expected.abs().max()
    y.sum().backward()
    dense = torch.cat([numerics.dequantize_weight(module.stored_weight(p), scheme, 32) for p in module.specs])
    assert torch.allclose(x.grad.float(), dense.sum(0).expand(2, 3, 32), rtol=2e-2, atol=0.05)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), y)
    state = {k: t.clone() for k, t in module.state_dict().items()}
    assert {"gate_proj.weight", "up_proj.weight_scale", "bias"} < set(state)
    module.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(module(x), y)


def test_compile():
    model = made(Biased)
    quantport.quantize_(model, "fp8_per_tensor")
    torch._dynamo.reset()
    compiled = torch.compile(model.gate_up_proj, fullgraph=True, backend="aot_eager")
    x = randn(4, 32).bfloat16()
    with torch.no_grad():
        assert torch.equal(compiled(x), model.gate_up_proj(x))


def linear(name, n):
    return Layer(name, "linear", (("weight", n, 8),), torch.bfloat16)


HEADS = {"hidden_size": 64, "num_attention_heads": 4}
CUTS = {
    "all heads alike": (48 * 4, HEADS, (64, 64, 64)),
    "groups": (64 + 2 * 32, {**HEADS, "num_key_value_heads": 2}, (64, 32, 32)),
    "head size": (3 * 4 * 10, {**HEADS, "head_dim": 10}, (40, 40, 40)),
    "inside": (192, {"text_config": HEADS}, (64, 64, 64)),
    "another sum": (100, HEADS, ()),
    "nothing": (192, {}, ()),
    "nonsense": (192, {"hidden_size": "64", "num_attention_heads": 0}, ()),
}


@pytest.mark.parametrize("what", CUTS)
def test_where_projections_end(what):
    n, config, sizes = CUTS[what]
    assert tuple(rows for _, rows in with_cuts(linear("a.qkv_proj", n), config).cuts) == sizes
    assert with_cuts(linear("a.o_proj", n), config).cuts == ()
    assert with_cuts(linear("a.gate_up_proj", 7), config).cuts == ()


def test_a_model_that_does_not_say_where_they_end():
    model = made(lambda: nn.ModuleDict({"qkv_proj": nn.Linear(32, 96)}))
    (step,) = quantport.plan(model, "fp8_per_tensor").quantized
    assert "does not say" in step.note
    assert quantport.plan(model, "int8").quantized[0].note.count("does not say") == 0
    quantport.quantize_(model, "fp8_per_tensor")
    assert isinstance(model["qkv_proj"], QuantLinear)


def test_patterns_still_name_the_layer_or_its_parts():
    layers = find_layers({"a.qkv_proj.weight": randn(192, 64)})
    assert layers[0].shards == ("a.q_proj", "a.k_proj", "a.v_proj")
    model = phi()
    plan = quantport.plan(model, "fp8_per_tensor", config={"ignore": ["*.[qkv]_proj"]})
    assert plan.by_layer[LAYER].requested_scheme is None


def test_nothing_is_done_when_one_projection_fails():
    model = phi()
    model.get_submodule(LAYER).weight[-1, -1] = float("nan")
    before = snapshot(model)
    with pytest.raises(WeightError) as caught:
        quantport.quantize_(model, "fp8_per_tensor")
    check_parts(caught.value, f"{LAYER}.v_proj")
    untouched(model, before)
