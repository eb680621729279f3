"""What is saved in formats of others: read back bit for bit, and loaded by Transformers without
quantport.
"""

from __future__ import annotations

import contextlib
import json
import re

import pytest
import torch
import transformers
from core_models import ids, same_bits
from format_checks import SIZES, Made, held, tiny
from safetensors.torch import load_file

import quantport
from quantport.checkpoint import Checkpoint
from quantport.errors import SaveError
from quantport.loading.quantize_checkpoint import quantize_checkpoint
from quantport_formats import grouped_write

WEIGHT_ONLY = (
    "int8_weight_only",
    "int4_weight_only",
    "int4_weight_only:g64",
    "fp8_weight_only",
    "mxfp4_weight_only",
    "nvfp4_weight_only",
)
DYNAMIC = ("int8", "fp8_per_channel", "fp8_per_tensor", "fp8_per_block", "mxfp4")
OF_EXPERTS = ("int8_weight_only", "int4_weight_only", "fp8_per_channel", "mxfp4_weight_only")
WHOLE = {"num_attention_heads": 4, "num_key_value_heads": 4}  # every size a multiple of 128
TOKENS = ids % SIZES["vocab_size"]


def saved(folder, scheme, name, kind="llama", **changes):
    """A model of a scheme, saved in a format."""
    config, tensors = tiny(kind, **changes)
    base = Made(config, tensors, {}).write(folder / "base")
    model = quantport.load(base, scheme, device="cpu")
    quantport.save(model, folder / "out", format=name)
    return model


def of_transformers(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    with torch.no_grad():
        return model(TOKENS).logits.float()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits.float()


def away(a, b):
    return float((a - b).norm() / b.norm())


def comes_back(model, folder):
    """Reads it again, and compares every bit."""
    again = quantport.load(folder, device="cpu")
    assert all(step.stored for step in again.quantport_plan.quantized)
    before, after = held(model), held(again)
    assert before.keys() == after.keys()
    for name, (scheme, values) in before.items():
        assert after[name][0].split(":")[0] == scheme.split(":")[0]
        assert same_bits(after[name][1], values), name


@pytest.mark.parametrize("scheme", [*WEIGHT_ONLY, *DYNAMIC])
def test_dense_models(scheme, tmp_path):
    model = saved(tmp_path, scheme, "compressed-tensors")
    comes_back(model, tmp_path / "out")
    ours, base = logits(model), of_transformers(tmp_path / "base")
    # both round the weights alike; activations are rounded as the scheme says, by each in its own order
    limit = 0.01 if scheme in WEIGHT_ONLY else 1.6 * away(ours, base)
    assert away(of_transformers(tmp_path / "out"), ours) < limit


@pytest.mark.parametrize("scheme", OF_EXPERTS)
def test_experts(scheme, tmp_path):
    model = saved(tmp_path, scheme, "compressed-tensors", "qwen3_moe")
    comes_back(model, tmp_path / "out")
    ours, base = logits(model), of_transformers(tmp_path / "base")
    limit = 0.01 if scheme in WEIGHT_ONLY else 1.6 * away(ours, base)
    assert away(of_transformers(tmp_path / "out"), ours) < limit


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_blocks_of_fp8(kind, tmp_path):
    model = saved(tmp_path, "fp8_per_block", "fp8", kind, **WHOLE)
    comes_back(model, tmp_path / "out")
    if kind == "llama":
        decoded = transformers.FineGrainedFP8Config(dequantize=True)  # its kernels need a GPU
        theirs = of_transformers(tmp_path / "out", quantization_config=decoded)
        weights = quantport.load(tmp_path / "out", device="cpu", fallback="weight_only")
        assert away(theirs, logits(weights)) < 0.05


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("int4_weight_only:g64:fp16", "qwen3_moe"),
        ("int4_weight_only:channel:fp16", "llama"),
        ("int8_weight_only:g32:fp16", "llama"),
    ],
)
def test_words_of_gptq(scheme, kind, tmp_path):
    model = saved(tmp_path, scheme, "gptq", kind)
    comes_back(model, tmp_path / "out")
    bits, stored = int(scheme[3]), load_file(tmp_path / "out" / "model.safetensors")
    for stem, values, scales, of in of_groups(model, stored):
        codes = codes_in(stored[f"{stem}.qweight"], bits)
        zeros = codes_in(stored[f"{stem}.qzeros"].t(), bits) + 1
        assert torch.equal(stored[f"{stem}.g_idx"].long(), of)
        assert same_bits((codes - zeros.t()[:, of]).float() * scales[:, of], values), stem


@pytest.mark.parametrize(("scheme", "kind"), [("g32", "qwen3_moe"), ("channel", "llama")])
def test_words_of_awq(scheme, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(grouped_write, "_ROWS", 48)  # some pieces of each weight, the last shorter
    model = saved(tmp_path, f"int4_weight_only:{scheme}:fp16", "awq", kind)
    comes_back(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for stem, values, scales, of in of_groups(model, stored):
        places = torch.arange(len(values)).view(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()
        codes, zeros = torch.empty(values.shape).long(), torch.empty(scales.shape).long()
        codes[places] = codes_in(stored[f"{stem}.qweight"].t(), 4).t()
        zeros[places] = codes_in(stored[f"{stem}.qzeros"].t(), 4).t()
        assert same_bits((codes - zeros[:, of]).float() * scales[:, of], values), stem


def codes_in(words, bits):
    """The codes in columns of words, each word from its lowest bits: ``[columns, codes]``."""
    unsigned = words.long() & 0xFFFFFFFF
    parts = [unsigned >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)]
    return torch.stack(parts, 1).flatten(0, 1).t()


def of_groups(model, stored):
    """For each weight its name, its values, its scales ``[n, groups]`` and the group of each input."""
    for weight, (_, values) in held(model).items():
        stem = weight.removesuffix(".weight")
        scales = stored[f"{stem}.scales"]
        assert scales.dtype is torch.float16
        of = torch.arange(values.shape[1]) // (values.shape[1] // len(scales))
        yield stem, values, scales.t().float(), of


def test_layers_of_other_bits_in_gptq(tmp_path):
    config, tensors = tiny()
    base = Made(config, tensors, {}).write(tmp_path / "base")
    others = {"*.down_proj": "int8_weight_only:channel:fp16"}
    settings = {"scheme": "int4_weight_only:g32:fp16", "targets": others, "ignore": ["*.o_proj"]}
    model = quantport.load(base, config=settings, device="cpu")
    quantport.save(model, tmp_path / "out", format="gptq")
    comes_back(model, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (said["bits"], said["group_size"]) == (4, 32)
    (down, own), (kept, nothing) = said["dynamic"].items()
    assert down.startswith("+:")
    assert re.fullmatch(down[2:], "model.layers.0.mlp.down_proj")
    assert own == {"bits": 8, "group_size": -1}
    assert kept.startswith("-:")
    assert re.fullmatch(kept[2:], "model.layers.0.self_attn.o_proj")
    assert nothing == {}


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_mxfp8(kind, tmp_path):
    model = saved(tmp_path, "mxfp8", "mxfp8", kind)
    comes_back(model, tmp_path / "out")
    if kind == "llama":
        decoded = transformers.FineGrainedFP8Config(dequantize=True)  # its kernels need a GPU
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.bfloat16, quantization_config=decoded
        )
        for name, (_, values) in held(model).items():
            assert same_bits(theirs.get_parameter(name).data, values.to(torch.bfloat16)), name


OF_MODELOPT = {
    "fp8_per_channel": "FP8_PER_CHANNEL_PER_TOKEN",
    "mxfp8": "MXFP8",
    "int8_weight_only": "W8A16",
}


@pytest.mark.parametrize("scheme", OF_MODELOPT)
def test_modelopt(scheme, tmp_path):
    model = saved(tmp_path, scheme, "modelopt", "llama" if scheme == "mxfp8" else "qwen3_moe")
    comes_back(model, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    beside = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert said["quant_algo"] == beside["quantization"]["quant_algo"] == OF_MODELOPT[scheme]
    assert said["ignore"] == beside["quantization"]["exclude_modules"] == ["lm_head"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, (_, values) in held(model).items():
        scale = stored[f"{name}_scale"]
        if scheme == "mxfp8":
            scale = (scale.float() - 127).exp2().repeat_interleave(32, 1)
        else:
            assert scale.shape == values.shape[:1]
            scale = scale.view(-1, 1)
        assert same_bits(stored[name].float() * scale, values), name


def test_modelopt_of_several_schemes(tmp_path):
    config, tensors = tiny()
    base = Made(config, tensors, {}).write(tmp_path / "base")
    targets = {"*.down_proj": "int8_weight_only"}
    model = quantport.load(base, "fp8_per_channel", config={"targets": targets}, device="cpu")
    quantport.save(model, tmp_path / "out", format="modelopt")
    comes_back(model, tmp_path / "out")


AUTO = {
    "int8": ({"scheme": "int8"}, "compressed-tensors", None),
    "int4": ({"scheme": "int4_weight_only"}, "compressed-tensors", None),
    "scheme": ({"scheme": "nf4"}, "quantport", "not as compressed-tensors: scheme 'nf4'"),
    "cache": ({"scheme": "int8", "kv_cache_dtype": "fp8_e4m3"}, "quantport", "the KV cache in fp8"),
    "fallback": ({"scheme": "int8", "fallback": "reference"}, "quantport", "fallback='reference'"),
    "embedding": (
        {"scheme": "int8", "targets": dict.fromkeys(("model.embed_tokens", "lm_head"), "int8_weight_only")},
        "quantport",
        "model.embed_tokens, a quantized embedding",
    ),
}


@pytest.mark.parametrize("case", AUTO.values(), ids=AUTO)
def test_auto_is_what_loses_nothing(case, tmp_path):
    settings, expected, why = case
    tied = "targets" in settings
    config, tensors = tiny(tie_word_embeddings=tied)
    if tied:
        del tensors["lm_head.weight"]
    base = Made(config, tensors, {}).write(tmp_path / "base")
    model = quantport.load(base, config=settings, device="cpu")
    said = contextlib.nullcontext() if why is None else pytest.warns(UserWarning, match=re.escape(why))
    with said:
        quantport.save(model, tmp_path / "out", format="auto")
    assert (tmp_path / "out" / "quantport.json").exists() == (expected == "quantport")
    comes_back(model, tmp_path / "out")
    again = quantport.plan(tmp_path / "out", device="cpu")
    assert again.format_name == expected
    assert again.config.kv_cache_dtype == settings.get("kv_cache_dtype")


def test_auto_leaves_what_is_no_model_of_transformers(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, dtype=torch.bfloat16))
    quantport.quantize_(model, "int8")
    with pytest.warns(UserWarning, match="it is no model of Transformers"):
        quantport.save(model, tmp_path / "out", format="auto")


def test_a_library_of_the_format_reads_the_configuration(tmp_path):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    saved(tmp_path, "fp8_per_channel", "compressed-tensors")
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    read = quantization.QuantizationConfig.model_validate(described)
    assert read.format == "float-quantized"
    assert read.ignore == ["lm_head"]
    (group,) = read.config_groups.values()
    assert (group.weights.strategy, group.input_activations.strategy) == ("channel", "token")
    assert group.input_activations.dynamic is True


def test_schemes_that_differ_are_groups(tmp_path):
    config, tensors = tiny()
    base = Made(config, tensors, {}).write(tmp_path / "base")
    model = quantport.load(
        base, "int8", config={"targets": {"*.down_proj": "int4_weight_only"}}, device="cpu"
    )
    quantport.save(model, tmp_path / "out", format="compressed-tensors")
    comes_back(model, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert described["format"] == "mixed-precision"
    assert sorted(map(tuple, (g["targets"] for g in described["config_groups"].values()))) == [
        ("Linear",),
        ("model.layers.0.mlp.down_proj",),
    ]


STREAMED = {
    "compressed-tensors": "int8_weight_only",
    "gptq": "int4_weight_only:g32:fp16",
    "awq": "int4_weight_only:g32:fp16",
    "modelopt": "fp8_per_channel",
    "mxfp8": "mxfp8",
    "auto": "int8",
}


@pytest.mark.parametrize("name", STREAMED)
def test_a_stream_writes_the_same_bytes(name, tmp_path):
    saved(tmp_path, STREAMED[name], name)
    quantize_checkpoint(tmp_path / "base", tmp_path / "stream", STREAMED[name], format=name)
    with Checkpoint.open(tmp_path / "out") as one, Checkpoint.open(tmp_path / "stream") as other:
        assert set(one.tensors) == set(other.tensors)
        assert all(same_bits(one.read(name), other.read(name)) for name in one.tensors)


def test_another_format_is_converted_on_the_way(tmp_path):
    saved(tmp_path, "int8", "compressed-tensors")
    quantize_checkpoint(tmp_path / "out", tmp_path / "again", "int4_weight_only", format="compressed-tensors")
    found = quantport.load(tmp_path / "again", device="cpu")
    assert {scheme.split(":")[0] for scheme, _ in held(found).values()} == {"int4_weight_only"}


@pytest.mark.parametrize("name", ["compressed-tensors", "fp8"])
def test_what_a_format_has_no_place_for_is_said(name, tmp_path):
    config, tensors = tiny(**WHOLE)
    base = Made(config, tensors, {}).write(tmp_path / "base")
    settings = {"scheme": "fp8_per_block", "kv_cache_dtype": "fp8", "fallback": "reference"}
    model = quantport.load(base, config=settings, device="cpu")
    with pytest.warns(UserWarning, match="the KV cache in fp8.* and fallback='reference' is not written"):
        quantport.save(model, tmp_path / "out", format=name)
    quantport.save(model, tmp_path / "own")  # which has a place for both
    assert quantport.load(tmp_path / "own", device="cpu").quantport_plan.config.fallback == "reference"


REFUSED = {
    "scheme": ("nf4", "compressed-tensors", "llama", "scheme 'nf4'"),
    "activations": ("nvfp4", "compressed-tensors", "llama", "scheme 'nvfp4'"),
    "offsets": ("int4_mse", "compressed-tensors", "llama", "scheme 'int4_mse'"),
    "experts": ("nvfp4_weight_only", "compressed-tensors", "qwen3_moe", "experts in NVFP4"),
    "other": ("int8", "fp8", "llama", "in scheme int8"),
    "size": ("fp8_per_block", "fp8", "llama", "k_proj [64, 128]"),
    "groups": (
        "int4_weight_only:g256",
        "compressed-tensors",
        "llama",
        "128 columns are no whole groups of 256",
    ),
    "unknown": ("int8", "exl2", "llama", "no such format"),
    "scales": ("int4_weight_only", "gptq", "llama", "whose scales in bf16 fp16 may not hold"),
    "scales of 8 bits": ("int8_weight_only", "gptq", "llama", "whose scales in fp32 fp16 may not hold"),
    "floats": ("fp8_weight_only", "gptq", "llama", "in scheme fp8_weight_only"),
    "bits": ("int8_weight_only:g32:fp16", "awq", "llama", "in scheme int8_weight_only:g32:fp16"),
    "words": ("int4_weight_only:g96:fp16", "awq", "llama", "in groups of 96"),
    "blocks": ("fp8_per_channel", "mxfp8", "llama", "in scheme fp8_per_channel"),
    "activations that are calibrated": ("fp8_per_tensor", "modelopt", "llama", "in scheme fp8_per_tensor"),
    "factor": ("nvfp4_weight_only", "modelopt", "llama", "whose factor divides here and multiplies there"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_a_format_cannot_hold_is_refused(case, tmp_path):
    scheme, name, kind, found = case
    with pytest.raises(SaveError) as caught:
        saved(tmp_path, scheme, name, kind)
    assert found in caught.value.found
    assert not (tmp_path / "out").exists()
