"""Stored scales of activations: used as compressed-tensors does, refused where they are none, and written."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
import transformers
from compressed_checkpoints import made, preset, static
from core_models import ids, same_bits
from core_references import check_parts
from format_checks import SIZES, Made, contradicts, held, keeps, of_inputs, quantizable, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_fp8 import quantized
from typer.testing import CliRunner

import quantport
from quantport.cli import app
from quantport.errors import CheckpointError, ConfigError, QuantportError, SaveError
from quantport.kernels.aten import Reference
from quantport.loading.quantize_checkpoint import quantize_checkpoint
from quantport.modules import QuantModule

INT, FLOAT = "int-quantized", "float-quantized"
OF_LIBRARY = {
    "int8": (static("W8A8"), INT, "int8:static"),
    "int8 asymmetric": (static("W8A8", symmetric=False), INT, "int8:static_asym"),
    "fp8": (preset("FP8"), FLOAT, "fp8_per_tensor:static"),
}
TOKENS = ids % SIZES["vocab_size"]


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits.float()


def of_transformers(folder, dtype=torch.float32, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def away(a, b):
    return float((a - b).norm() / b.norm())


def by_hand(kind="llama", zero=True):
    """int8 with a scale for each row, inputs by one scale: in the names of compressed-tensors."""
    config, tensors = tiny(kind)
    values, inputs = {}, {}
    for number, name in enumerate(quantizable(tensors)):
        stem, w = name.removesuffix(".weight"), tensors[name].float()
        scale = w.abs().amax(1, keepdim=True) / 127
        tensors[name], tensors[f"{stem}.weight_scale"] = (w / scale).round().to(torch.int8), scale
        values[name] = tensors[name].float() * scale
        inputs[name] = 2.0**-5 * (number % 3 + 1), 5 - number if zero else 0
        tensors[f"{stem}.input_scale"] = torch.tensor([inputs[name][0]])
        if zero:
            tensors[f"{stem}.input_zero_point"] = torch.tensor([inputs[name][1]], dtype=torch.int8)
    args = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": {**args, "strategy": "channel"},
        "input_activations": {**args, "strategy": "tensor", "symmetric": not zero},
    }
    described = {"quant_method": "compressed-tensors", "format": INT, "config_groups": {"group_0": group}}
    described |= {"ignore": ["lm_head"], "quantization_status": "compressed"}
    scheme = "int8:static_asym" if zero else "int8:static"
    return Made({**config, "quantization_config": described}, tensors, values, scheme, inputs=inputs)


@pytest.mark.parametrize("case", OF_LIBRARY.values(), ids=OF_LIBRARY)
def test_logits_are_those_of_transformers(case, tmp_path):
    """In fp32, where nothing rounds but the codes; a code beside a tie may go either way."""
    folder = made(*case, dtype=torch.float32).write(tmp_path)
    ours = quantport.load(folder, device="cpu", fallback="reference")
    theirs = of_transformers(folder)
    assert {step.choice.activations for step in ours.quantport_plan.quantized} == {
        "int8 per tensor, stored scale and zero point"
        if "asym" in case[2]
        else f"{'int8' if 'int8' in case[2] else 'e4m3fn'} per tensor, stored scale"
    }
    dynamic = quantport.load(folder, case[2].partition(":")[0], device="cpu", fallback="reference")
    assert away(logits(ours), logits(theirs)) < 2e-3 < away(logits(dynamic), logits(theirs))


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("zero", [True, False])
def test_a_checkpoint_by_hand(kind, zero, tmp_path):
    """Each weight has the scale of its own inputs, also where q, k and v, or experts, have others."""
    model = keeps(by_hand(kind, zero), tmp_path)
    scales = {scale for scale, _ in of_inputs(model).values()}
    assert len(scales) == 3
    emulated = quantport.load(tmp_path, device="cpu")
    for module in emulated.modules():
        if isinstance(module, QuantModule):
            module.repack(Reference())
    assert away(logits(model), logits(emulated)) < 0.02


def test_a_plan_says_it(tmp_path):
    folder = by_hand().write(tmp_path)
    (step, *_) = quantport.plan(folder, device="cuda:sm_90").quantized
    assert step.choice.activations == "int8 per tensor, stored scale and zero point"
    assert step.choice.status == "native"
    weights = quantport.plan(folder, device="npu:910b").quantized[0].choice
    assert (weights.status, weights.activations) != ("native", step.choice.activations)
    assert any("takes none that is stored" in reason for reason in weights.reasons)


def test_inspect_says_it(tmp_path):
    folder = by_hand(zero=False).write(tmp_path)
    done = CliRunner().invoke(app, ["inspect", str(folder), "--device", "cpu:x86_vnni", "--json"])
    (device,) = json.loads(done.stdout)["devices"]
    (does,) = device["does"]
    assert does.startswith("7 layers int8:static as W8A8 native by cpu.int8")
    assert does.endswith("activations int8 per tensor, stored scale")


def test_sixteen_bit_activations_are_said(tmp_path):
    folder = quantized("llama", "tensor", "input_scale").write(tmp_path)
    choice = quantport.plan(folder, device="cpu:x86_avx2").quantized[0].choice
    assert choice.activations == "16-bit"
    assert any("stored scale of activations is kept and not used" in reason for reason in choice.reasons)


def test_nothing_is_quantized_to_a_scale_that_nobody_measured(tmp_path):
    config, tensors = tiny()
    folder = Made(config, tensors, {}).write(tmp_path)
    for call in (quantport.plan, quantport.load):
        with pytest.raises(ConfigError) as caught:
            call(folder, "int8:static", device="cpu")
        assert "measured on data" in caught.value.found
        assert "'int8'" in caught.value.suggestion


SCALE, ZERO = ".input_scale", ".input_zero_point"
DAMAGE = {
    "absent": ({SCALE: None}, "no such tensor"),
    "no zero point": ({ZERO: None}, "no such tensor"),
    "for each input": ({SCALE: torch.ones(128)}, "shape [128]"),
    "integer": ({SCALE: torch.ones(1, dtype=torch.int32)}, "torch.int32"),
    "zero points": ({ZERO: torch.zeros(2, dtype=torch.int8)}, "shape [2]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_headers_that_are_wrong_are_refused(damage, tmp_path):
    contradicts(by_hand(), tmp_path, *damage)


VALUES = {
    "zero": (SCALE, torch.tensor([0.0])),
    "negative": (SCALE, torch.tensor([-0.1])),
    "nan": (SCALE, torch.tensor([float("nan")])),
    "infinite": (SCALE, torch.tensor([float("inf")])),
    "beyond codes": (ZERO, torch.tensor([128], dtype=torch.int32)),
    "no integer": (ZERO, torch.tensor([0.5])),
}


@pytest.mark.parametrize("damage", VALUES.values(), ids=VALUES)
def test_values_that_are_wrong_are_refused(damage, tmp_path):
    key, value = damage
    checkpoint = by_hand()
    checkpoint.tensors[f"model.layers.0.mlp.up_proj{key}"] = value
    with pytest.raises(QuantportError) as caught:
        quantport.load(checkpoint.write(tmp_path), device="cpu")
    assert f"up_proj{key}" in caught.value.asked
    assert caught.value.found == f"{value.item():g}"


def test_a_zero_point_beside_symmetric_activations_must_be_zero(tmp_path):
    checkpoint = by_hand(zero=False)
    name = f"model.layers.0.mlp.up_proj{ZERO}"
    checkpoint.tensors[name] = torch.zeros(1, dtype=torch.int8)
    keeps(checkpoint, tmp_path / "a")
    checkpoint.tensors[name] = torch.ones(1, dtype=torch.int8)
    with pytest.raises(QuantportError, match="0: activations are symmetric"):
        quantport.load(checkpoint.write(tmp_path / "b"), device="cpu")


def test_a_scale_beside_weights_alone_is_named(tmp_path):
    checkpoint = by_hand(zero=False)
    group = checkpoint.config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = None
    checkpoint.scheme, checkpoint.inputs = "int8_weight_only", {}
    with pytest.warns(UserWarning, match="7 stored scales of activations .* are not used"):
        keeps(checkpoint, tmp_path)


@pytest.mark.parametrize("name", ["compressed-tensors", "quantport"])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_what_came_in_goes_out(name, kind, tmp_path):
    model = quantport.load(by_hand(kind).write(tmp_path / "in"), device="cpu")
    quantport.save(model, tmp_path / "out", format=name)
    again = quantport.load(tmp_path / "out", device="cpu")
    assert all(step.stored for step in again.quantport_plan.quantized)
    assert of_inputs(again) == of_inputs(model)
    for weight, (scheme, values) in held(again).items():
        assert scheme.startswith("int8")
        assert same_bits(values, held(model)[weight][1])
    assert torch.equal(logits(again), logits(model))
    quantize_checkpoint(tmp_path / "in", tmp_path / "stream", format=name)
    assert of_inputs(quantport.load(tmp_path / "stream", device="cpu")) == of_inputs(model)


@pytest.mark.parametrize("case", OF_LIBRARY.values(), ids=OF_LIBRARY)
def test_transformers_loads_what_is_written(case, tmp_path):
    folder = made(*case, dtype=torch.float32).write(tmp_path / "in")
    model = quantport.load(folder, device="cpu")
    quantport.save(model, tmp_path / "out", format="compressed-tensors")
    theirs = of_transformers(tmp_path / "out")
    assert (
        theirs.model.layers[0].mlp.up_proj.input_scale.item()
        == of_inputs(model)["model.layers.0.mlp.up_proj.weight"][0]
    )
    assert away(logits(theirs), logits(of_transformers(folder))) < 1e-6


@pytest.mark.parametrize(("scales", "end"), [("tensor", "input_scale"), ("block", "activation_scale")])
def test_fp8_is_written_under_the_names_of_transformers(scales, end, tmp_path):
    whole = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = quantport.load(quantized("llama", scales, end, **whole).write(tmp_path / "in"), device="cpu")
    quantport.save(model, tmp_path / "out", format="fp8")
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert described["activation_scheme"] == "static"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.activation_scale"].shape == ()
    again = quantport.load(tmp_path / "out", device="cpu")
    assert of_inputs(again) == of_inputs(model)
    for weight, (scheme, values) in held(again).items():
        assert scheme == held(model)[weight][0]
        assert same_bits(values, held(model)[weight][1])
    decoded = transformers.FineGrainedFP8Config(dequantize=True)  # its kernels need a GPU
    theirs = of_transformers(tmp_path / "out", torch.bfloat16, quantization_config=decoded)
    assert away(logits(theirs), logits(model)) < 0.05


def test_modelopt_is_written(tmp_path):
    model = quantport.load(quantized("llama", "tensor", "input_scale").write(tmp_path / "in"), device="cpu")
    quantport.save(model, tmp_path / "out", format="modelopt")
    described = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert described["quant_algo"] == "FP8"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    ends = ("weight_scale", "input_scale")
    assert {stored[f"model.layers.0.mlp.up_proj.{end}"].shape for end in ends} == {()}
    assert of_inputs(quantport.load(tmp_path / "out", device="cpu")) == of_inputs(model)


@pytest.mark.parametrize("name", ["fp8", "modelopt", "gptq", "gguf"])
def test_a_format_without_a_place_for_them_refuses(name, tmp_path):
    model = quantport.load(by_hand().write(tmp_path / "in"), device="cpu")
    with pytest.raises(SaveError, match="int8:static_asym"):
        quantport.save(model, tmp_path / "out", format=name)
    assert not (tmp_path / "out").exists()


def test_experts_of_fp8_are_refused_by_the_format(tmp_path):
    made_of = quantized("qwen3_moe", "tensor", "input_scale")
    model = quantport.load(made_of.write(tmp_path / "in"), device="cpu")
    with pytest.raises(SaveError, match="of experts, whose scales Transformers fuses"):
        quantport.save(model, tmp_path / "out", format="fp8")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scale=st.one_of(st.floats(width=32), st.sampled_from([1e-38, 1e-45, 3e38])),
    zero=st.integers(-300, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shape=st.sampled_from([(), (1,), (1, 1), (2,), (0,)]),
)
def test_any_scale_is_taken_or_refused(scale, zero, dtype, shape, tmp_path):
    checkpoint = ANY
    stem, stored = "model.layers.0.mlp.up_proj", torch.full(shape, scale, dtype=torch.float32).to(dtype)
    checkpoint.tensors[stem + SCALE] = stored
    checkpoint.tensors[stem + ZERO] = torch.tensor([zero], dtype=torch.int32)
    checkpoint.write(tmp_path)
    value = stored.float().flatten()[:1].sum().item()
    good = shape in ((), (1,), (1, 1)) and 0 < value < float("inf") and -128 <= zero <= 127
    with contextlib.nullcontext() if good else pytest.raises(QuantportError):
        model = quantport.load(tmp_path, device="cpu")
        assert of_inputs(model)[f"{stem}.weight"] == (value, zero)


ANY = by_hand()


@pytest.mark.parametrize(("scales", "end"), [("tensor", "input_scale"), ("block", "activation_scale")])
def test_a_scale_that_is_missing_is_named_as_the_others_are(scales, end, tmp_path):
    folder = quantized("llama", scales, end).write(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.0.mlp.up_proj.{end}"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        quantport.load(folder, device="cpu")
    check_parts(caught.value, f"up_proj.{end}", "no such tensor")
