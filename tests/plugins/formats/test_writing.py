"""What is saved in formats of others: read back bit for bit, and loaded by Transformers without
quantport.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from core_models import ids, same_bits
from format_checks import SIZES, Made, held, tiny

import quantport
from quantport.checkpoint import Checkpoint
from quantport.errors import SaveError
from quantport.loading.quantize_checkpoint import quantize_checkpoint

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


def test_a_stream_writes_the_same_bytes(tmp_path):
    saved(tmp_path, "int8_weight_only", "compressed-tensors")
    quantize_checkpoint(
        tmp_path / "base", tmp_path / "stream", "int8_weight_only", format="compressed-tensors"
    )
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
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_a_format_cannot_hold_is_refused(case, tmp_path):
    scheme, name, kind, found = case
    with pytest.raises(SaveError) as caught:
        saved(tmp_path, scheme, name, kind)
    assert found in caught.value.found
    assert not (tmp_path / "out").exists()
