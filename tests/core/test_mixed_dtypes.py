"""Checkpoints of several dtypes: what stays is held as Transformers holds it; no values collapse unasked."""

from __future__ import annotations

import pytest
import torch
from core_models import Tiny, made, same_bits, same_state, write
from core_references import check_parts
from core_transformers import checkpoint, close, kept_alike, of_transformers, outputs, tiny
from torch import nn

import quantport
from quantport.errors import WeightError
from quantport.model.roles import SkipCode
from quantport.modules import QuantLinear

WIDE = {"float32": torch.float32, "float64": torch.float64}
PARTS = {
    "norms": ("llama", "norm"),
    "head": ("llama", "lm_head"),
    "embedding": ("llama", "embed_tokens"),
    "biases": ("qwen2", "bias"),
    "a kept layer": ("llama", "o_proj"),
    "a layer that is quantized": ("llama", "q_proj"),
    "norms of OPT": ("opt", "layer_norm"),
}


def mixed(folder, name, part, dtype, base=torch.bfloat16, **options):
    """A checkpoint in which the tensors that are called so have another dtype."""
    model = tiny(name, base, **options)
    wider = {n: t.to(dtype) * 1.001 for n, t in model.state_dict().items() if part in n}
    tied = set(model.all_tied_weights_keys)
    return checkpoint(folder, model, **{n.replace(".", "__"): t for n, t in wider.items() if n not in tied})


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.filterwarnings("ignore:stored in float64")
def test_runs_as_with_the_dtype_of_the_configuration(part, dtype, tmp_path):
    name, inside = PARTS[part]
    folder = mixed(tmp_path / "c", name, inside, WIDE[dtype])
    reference = of_transformers(folder)
    kept = "*.out_proj" if name == "opt" else "*.o_proj"
    model = quantport.load(folder, config={"scheme": "int8_weight_only", "ignore": [kept]})
    assert kept_alike(model, reference)
    assert close(outputs(model), outputs(reference), 0.05)
    same_state(quantport.load(quantport.save(model, tmp_path / "q")), model)


def test_float64_is_said(tmp_path):
    folder = mixed(tmp_path / "c", "llama", "norm", torch.float64)
    (text,) = quantport.plan(folder).warnings
    assert "float64, held in bfloat16: model.layers.0.input_layernorm.weight" in text
    assert "and 2 more" in text
    with pytest.warns(UserWarning, match="float64") as caught:
        plan = quantport.load(folder, "int8").quantport_plan
    assert [str(w.message) for w in caught] == [text] == list(plan.warnings)
    step = plan.by_layer["model.norm.weight"]
    assert (step.before, step.after) == (32 * 8, 32 * 2)
    assert "held in torch.bfloat16" in step.note


def test_of_several_dtypes_the_configuration_names_that_of_the_model(tmp_path):
    folder = mixed(tmp_path / "c", "llama", "layers.0.mlp.up_proj", torch.bfloat16, torch.float32)
    assert quantport.load(folder, "int8").dtype is of_transformers(folder).dtype is torch.float32
    folder = mixed(tmp_path / "d", "llama", "layers.0", torch.float32)
    assert quantport.load(folder, "int8").dtype is of_transformers(folder).dtype is torch.bfloat16


def test_without_a_configuration_most_elements_decide(tmp_path):
    state = made(Tiny, torch.float32).state_dict()
    for name, most in {"down.weight": torch.float32, "embed_tokens.weight": torch.float32}.items():
        folder = write(tmp_path / name, {**state, name: state[name].bfloat16()})
        assert quantport.load(folder, "int8", model=Tiny).norm.weight.dtype is most


KEPT = {
    "glm4_moe": (torch.bfloat16, "e_score_correction_bias"),
    "deepseek_v3": (torch.float16, "e_score_correction_bias"),
    "t5": (torch.float16, ".wo."),
}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KEPT)
def test_what_a_class_keeps_in_float32(name, stored, tmp_path):
    dtype, part = KEPT[name]
    folder = mixed(tmp_path / "c", name, part, stored)
    reference = of_transformers(folder, dtype)
    model = quantport.load(folder, "int8_weight_only", dtype=dtype)
    state, expected = model.state_dict(), reference.state_dict()
    kept = [n for n in expected if part in n]
    assert kept
    for n in kept:
        assert state[n].dtype is expected[n].dtype is torch.float32
        assert same_bits(state[n], expected[n])
    kept_alike(model, reference)
    assert close(outputs(model), outputs(reference))
    same_state(quantport.load(quantport.save(model, tmp_path / "q"), dtype=dtype), model)


def test_a_layer_that_a_class_keeps_in_float32_is_not_quantized_in_memory_either(tmp_path):
    folder = mixed(tmp_path / "c", "t5", ".wo.", torch.float32)
    model = of_transformers(folder, torch.float16)
    plan = quantport.quantize_(model, "int8_weight_only")
    loaded = quantport.load(folder, "int8_weight_only", dtype=torch.float16).quantport_plan
    for steps in (plan.by_layer, loaded.by_layer):
        step = steps["encoder.block.0.layer.1.DenseReluDense.wo"]
        assert step.layer.skipped_as(SkipCode.KEPT_FP32)
        assert "T5ForConditionalGeneration" in step.note
    # in bf16 its class does not
    wide = quantport.load(folder, "int8_weight_only").quantport_plan
    assert wide.by_layer["encoder.block.0.layer.1.DenseReluDense.wo"].requested_scheme


class Diffusion(nn.Module):
    """As diffusers says it: parts of names."""

    _keep_in_fp32_modules = ("scale_shift_table", "time_embedder")

    def __init__(self):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, 32))
        self.time_embedder, self.proj = nn.Linear(32, 32), nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)

    def forward(self, x):
        shift, scale = self.scale_shift_table + self.time_embedder(x.float())[:1]
        return self.proj(self.norm(x) * (1 + scale).to(x.dtype) + shift.to(x.dtype))


class Half(Diffusion):
    """Says it by what it makes."""

    _keep_in_fp32_modules = None

    def __init__(self):
        super().__init__()
        self.proj.bfloat16()
        self.norm.bfloat16()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factory", [Diffusion, Half])
def test_what_other_models_keep_in_float32(factory, dtype, tmp_path):
    state = made(factory, torch.float32).state_dict()
    stored = {
        n: t if n.startswith(("scale_shift_table", "time_embedder")) else t.bfloat16()
        for n, t in state.items()
    }
    model = quantport.load(write(tmp_path / "c", stored), "int8", model=factory, dtype=dtype)
    assert isinstance(model.proj, QuantLinear)
    for name in ("scale_shift_table", "time_embedder.bias"):
        assert same_bits(model.state_dict()[name], state[name])
    assert model.norm.weight.dtype is (dtype or torch.bfloat16)
    assert same_bits(model.time_embedder.weight, state["time_embedder.weight"])
    assert model(torch.ones(2, 32, dtype=dtype or torch.bfloat16)).isfinite().all()


def test_buffers_that_a_model_makes_wide_stay_so(tmp_path):
    class Rotary(Tiny):
        def __init__(self):
            super().__init__()
            self.register_buffer("inv_freq", 1 / 10000 ** (torch.arange(8).float() / 8))
            self.register_buffer("table", torch.rand(8, dtype=torch.float64))

    state = made(Rotary, torch.bfloat16).state_dict()
    state |= {"inv_freq": Rotary().inv_freq, "table": Rotary().table}
    for dtype in (None, torch.float16):
        model = quantport.load(write(tmp_path / "c", state), "int8", model=Rotary, dtype=dtype)
        assert same_bits(model.inv_freq, state["inv_freq"])
        assert same_bits(model.table, state["table"])


COLLAPSE = {
    "all equal": (1 + torch.arange(32) * 1e-5, torch.bfloat16, "all become 1"),
    "all zero": (torch.full((32,), 1e-9), torch.float16, "all become 0"),
    "infinite": (torch.arange(32) * 1e4, torch.float16, "become infinite"),
}


@pytest.mark.parametrize("what", COLLAPSE)
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_values_that_would_collapse(name, what, tmp_path):
    values, dtype, found = COLLAPSE[what]
    model = tiny("qwen2")
    folder = checkpoint(tmp_path / "c", model, **{name.replace(".", "__"): values})
    with pytest.raises(WeightError) as caught:
        quantport.load(folder, "int8", dtype=dtype)
    check_parts(caught.value, name, found, "dtype=torch.float32", "cast", str(dtype))
    asked = quantport.load(folder, config={"scheme": "int8", "cast": [name]}, dtype=dtype)
    assert same_bits(asked.get_parameter(name), values.to(dtype))
    wide = quantport.load(folder, "int8", dtype=torch.float32)
    assert same_bits(wide.get_parameter(name), values)


@pytest.mark.parametrize("values", [torch.ones(32), torch.zeros(32), torch.full((32,), float("-inf"))])
def test_values_that_are_equal_anyway_do_not_collapse(values, tmp_path):
    folder = checkpoint(tmp_path / "c", tiny("qwen2"), model__layers__0__self_attn__q_proj__bias=values)
    if values.isfinite().all():
        quantport.load(folder, "int8")
    else:
        with pytest.warns(UserWarning, match="Inf"):
            quantport.load(folder, "int8")


def test_a_pattern_of_cast_that_matches_nothing_is_refused(tmp_path):
    folder = checkpoint(tmp_path / "c", tiny("qwen2"))
    with pytest.raises(quantport.QuantportError, match="norms"):
        quantport.load(folder, config={"scheme": "int8", "cast": ["norms"]})
