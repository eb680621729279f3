"""load: the same bits as quantizing in memory, for every scheme, dtype and way to store experts."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from core_models import DENSE, MOE, SCHEMES, Expert, Moe, Tiny, ids, made, same_bits, same_state, write
from core_references import randn
from torch import nn
from transformers import AutoModelForCausalLM

import quantport
from quantport import numerics
from quantport.modules import QuantExperts, QuantLinear, QuantModule
from quantport.scheme.catalog import BUILTIN


@pytest.fixture(scope="module")
def originals():
    return {
        path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval().requires_grad_(False)
        for path in (DENSE, MOE)
    }


def fresh(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval().requires_grad_(False)


SLOW = [
    pytest.param(MOE, s, marks=pytest.mark.slow)
    for s in SCHEMES
    if s not in ("int8", "fp8_per_block", "int4_weight_only_g32")
]
QUICK = [(DENSE, s) for s in SCHEMES] + [(MOE, s) for s in ("int8", "fp8_per_block", "int4_weight_only_g32")]


@pytest.mark.parametrize(("path", "scheme"), [*QUICK, *SLOW], ids=lambda p: getattr(p, "name", p))
def test_load_equals_quantize(path, scheme, originals):
    """Bit by bit; and the logits are those of a 16-bit model that holds the dequantized weights, when
    activations are 16-bit.
    """
    loaded, model = quantport.load(path, scheme), copy.deepcopy(originals[path])
    plan = quantport.quantize_(model, scheme)
    same_state(loaded, model)
    steps = loaded.quantport_plan.by_layer
    assert all(
        steps[s.layer.name].requested_scheme == s.requested_scheme and steps[s.layer.name].after == s.after
        for s in plan.quantized
    )
    assert len(plan.quantized) == len(loaded.quantport_plan.quantized)
    assert not loaded.training
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    logits, full = loaded(ids).logits.float(), originals[path](ids).logits.float()
    assert logits.isfinite().all()
    assert torch.equal(logits, model(ids).logits.float())
    error = (logits - full).norm() / full.norm()
    assert error < (0.5 if "int4" in scheme else 0.15), error


def test_what_was_quantized(originals):
    dense, moe = quantport.load(DENSE, "int8"), quantport.load(MOE, "int8")
    assert sum(isinstance(m, QuantLinear) and m.scheme == "int8" for m in dense.modules()) == 6 * 7
    assert sum(isinstance(m, QuantLinear) and m.scheme == "int8" for m in moe.modules()) == 4 * 4
    assert sum(isinstance(m, QuantExperts) for m in moe.modules()) == 4
    assert dense.get_input_embeddings().weight is dense.lm_head.weight, "tied"
    kept = [s.note for s in dense.quantport_plan.steps if s.layer.kind == "linear" and not s.requested_scheme]
    assert kept == ["embedding: looked up, not multiplied"]
    notes = {
        s.layer.name: s.note
        for s in moe.quantport_plan.steps
        if s.layer.kind == "linear" and not s.requested_scheme
    }
    assert notes["lm_head"].startswith("output head")
    assert sum(note.startswith("router") for note in notes.values()) == 4
    assert str(dense.quantport_plan.source) == str(DENSE)


def test_loaded_weights_are_those_of_the_reference(originals):
    moe = quantport.load(MOE, "int4_g32")
    experts, original = moe.model.layers[2].mlp.experts, originals[MOE].model.layers[2].mlp.experts
    gate, up = original.gate_up_proj[5].chunk(2)
    for name, weight in (("5.gate_proj", gate), ("5.up_proj", up), ("5.down_proj", original.down_proj[5])):
        expected = numerics.quantize_weight(weight, BUILTIN["int4_g32"])
        assert all(same_bits(experts.stored_weight(name)[key], tensor) for key, tensor in expected.items())


def test_generate():
    model = quantport.load(DENSE, "int8")
    out = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 16)


def test_fused_experts_in_the_checkpoint(tmp_path, originals):
    """The 3-D names of current Transformers give the same model as the experts one by one."""
    folder = write(
        tmp_path / "fused", originals[MOE].state_dict(), config__json=(MOE / "config.json").read_text()
    )
    assert any("experts.gate_up_proj" in name for name in originals[MOE].state_dict())
    same_state(quantport.load(folder, "fp8_per_block"), quantport.load(MOE, "fp8_per_block"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "fp8_per_block", "int4_g32"])
def test_factory(tmp_path, dtype, scheme):
    """Any module: biases, odd shapes, one column, experts as modules, buffers; in every dtype of
    checkpoints.
    """
    original = made(Tiny, dtype)
    model = quantport.load(write(tmp_path / "c", original), scheme, model=Tiny)
    expected = made(Tiny, dtype)
    quantport.quantize_(expected, scheme)
    same_state(model, expected)
    asked = {s.layer.name for s in model.quantport_plan.quantized}
    assert asked == {
        "up",
        "down",
        "narrow",
        *(f"moe.experts.{e}.{p}_proj" for e in range(3) for p in ("gate", "up", "down")),
    }
    assert model.up.bias.dtype == model.norm.weight.dtype == model.embed_tokens.weight.dtype == dtype
    assert type(model.moe.gate) is nn.Linear
    assert type(model.lm_head).__name__ in ("Linear", "QuantLinear")
    tokens = torch.arange(12).view(2, 6)
    full = original(tokens).float()
    error = (model(tokens).float() - full).norm() / full.norm()
    assert error < (0.2 if "int4" in scheme else 0.06), error


def test_expert_biases(tmp_path):
    def factory():
        return nn.ModuleDict({"moe": Moe(bias=True)})

    model = quantport.load(write(tmp_path / "c", made(factory)), "int8", model=factory)
    assert isinstance(model["moe"].experts[0].up_proj, QuantLinear)
    assert torch.equal(model["moe"].experts[2].down_proj.bias, made(factory)["moe"].experts[2].down_proj.bias)


def test_a_dtype_of_choice(tmp_path):
    folder = write(tmp_path / "c", made(Tiny, torch.bfloat16))
    model = quantport.load(folder, "int8", model=Tiny, dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model(torch.arange(4)[None]).dtype == torch.float16


def test_a_dtype_of_choice_for_a_float32_checkpoint(tmp_path):
    folder = write(tmp_path / "c", made(Tiny, torch.float32))
    model = quantport.load(folder, "int8", model=lambda: Tiny().bfloat16(), dtype=torch.bfloat16)
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("config", [{"moe": None}, {"ignore": ["*.experts"]}], ids=str)
def test_experts_that_stay_are_fused_as_the_model_wants_them(config, originals):
    """The checkpoint stores them one by one; Transformers' module wants two tensors."""
    model = quantport.load(MOE, config={"scheme": "int8", **config})
    for i, layer in enumerate(model.model.layers):
        expected = originals[MOE].model.layers[i].mlp.experts
        assert torch.equal(layer.mlp.experts.gate_up_proj, expected.gate_up_proj)
        assert torch.equal(layer.mlp.experts.down_proj, expected.down_proj)


def test_ignore_targets_and_moe(tmp_path):
    config = {
        "scheme": "int8",
        "ignore": ["*.o_proj"],
        "targets": {"lm_head": "w4a16", "re:.*k_proj": "fp8"},
        "moe": None,
    }
    model = quantport.load(MOE, config=config)
    asked = {s.layer.name: s.requested_scheme for s in model.quantport_plan.steps}
    assert asked["model.layers.0.self_attn.q_proj"] == model.model.layers[0].self_attn.q_proj.scheme == "int8"
    assert asked["model.layers.0.self_attn.k_proj"] == "fp8_per_tensor"
    assert asked["model.layers.0.self_attn.o_proj"] is None
    assert asked["lm_head"] == model.lm_head.scheme == "int4_weight_only"
    assert not any(isinstance(m, QuantExperts) for m in model.modules())
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("pattern", ["moe.experts", "moe.experts.*", "re:moe.experts.*proj"])
def test_experts_as_modules_take_the_patterns_of_the_plan(tmp_path, pattern):
    """plan() from headers names moe.experts as one layer; load with the same configuration must agree."""
    folder = write(tmp_path / "c", made())
    config = {"scheme": "int8", "ignore": [pattern]}
    expected = {s.layer.name for s in quantport.plan(folder, config=config).quantized}
    loaded = quantport.load(folder, config=config, model=Tiny)
    assert {s.layer.name for s in loaded.quantport_plan.quantized} == expected == {"up", "down", "narrow"}


def test_no_scheme_lets_the_device_choose_and_say_why():
    model = quantport.load(DENSE)
    scheme = (
        model.quantport_plan.steps[-1].requested_scheme or model.quantport_plan.quantized[0].requested_scheme
    )
    assert model.quantport_plan.why.startswith(scheme)


def test_progress_and_threads(tmp_path):
    threads, seen = torch.get_num_threads(), []
    folder = write(tmp_path / "c", made())
    quantport.load(
        folder,
        "int8",
        model=Tiny,
        progress=lambda done, total, name: seen.append((done, total, name)),
        workers=3,
    )
    assert [d for d, _, _ in seen] == sorted(d for d, _, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in made().state_dict().values())
    assert len([done for done, _, _ in seen if done]) == len(made().state_dict())
    assert [name for done, _, name in seen if not done] == [
        "reading headers",
        "building the model",
        "choosing kernels",
    ]
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_show(workers):
    same_state(quantport.load(MOE, "int4", workers=workers), quantport.load(MOE, "int4"))


def test_one_file_and_extra_config_keys(tmp_path):
    config = {**json.loads((DENSE / "config.json").read_text()), "quantization_config": None}
    folder = write(tmp_path / "c", fresh(DENSE), config__json=json.dumps(config))
    same_state(quantport.load(folder, "int8"), quantport.load(DENSE, "int8"))
    same_state(quantport.load(folder / "model.safetensors", "int8"), quantport.load(DENSE, "int8"))


def test_zero_size_and_one_column(tmp_path):
    def factory():
        return nn.ModuleDict(
            {
                "empty": nn.Linear(4, 0),
                "hollow": nn.Linear(0, 4),
                "one": nn.Linear(1, 3),
                "row": nn.Linear(5, 1),
            }
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that initializing nothing is a no-op
        model = quantport.load(write(tmp_path / "c", made(factory)), "int4", model=factory)
    notes = {s.layer.name: s.note for s in model.quantport_plan.steps if not s.requested_scheme}
    assert notes["empty"] == notes["hollow"] == "zero-size weight"
    assert isinstance(model["one"], QuantModule)
    assert isinstance(model["row"], QuantModule)
    assert model["empty"](randn(2, 4, dtype=torch.bfloat16)).shape == (2, 0)
    assert model["row"](randn(0, 5, dtype=torch.bfloat16)).shape == (0, 1)
    assert model["one"](randn(2, 3, 1, dtype=torch.bfloat16)).shape == (2, 3, 3)


def test_expert_module_alone():
    """A single expert block by itself is three linear layers."""
    model = made(Expert)
    assert [s.layer.name for s in quantport.quantize_(model, "int8").quantized] == [
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
