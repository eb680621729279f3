"""What cannot be done is refused by name, before a weight is read."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import torch
from core_models import same_state, write
from core_references import check_parts
from core_transformers import checkpoint, tiny
from hf_models import QuantportConfig, from_pretrained, save, transformers
from transformers.quantizers import auto

import quantport
import quantport_transformers
from quantport.errors import CheckpointError, ConfigError, DeviceError, QuantportError, UnsupportedError


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        ({"scheem": "int8"}, ("scheem", "scheme")),
        ({"scheme": "int9"}, ("int9", "int8")),
        ({"scheme": "int8", "ignored": ["lm_head"]}, ("ignored", "ignore")),
        ({"scheme": "int8", "targets": {"lm_head": "int9"}}, ("int9",)),
        ({"scheme": "int8", "ignore": ["re:("]}, ("re:(",)),
        ({"scheme": "int8", "activation_scheme": "static"}, ("static",)),
        ({"scheme": "int8", "load_in_4bit_please": True}, ("load_in_4bit_please",)),
        ({"quant_method": "fp8"}, ("quant_method='fp8'", "quantport")),
    ],
)
def test_a_configuration(asked, parts):
    for make in (lambda: QuantportConfig(**asked), lambda: QuantportConfig.from_dict(asked)):
        with pytest.raises(ConfigError) as caught:
            make()
        check_parts(caught.value, *parts)


def test_a_configuration_in_the_dict_form(tmp_path):
    folder = save(tmp_path, "untied")
    with pytest.raises(ConfigError) as caught:
        from_pretrained(folder, quantization_config={"quant_method": "quantport", "scheem": "int8"})
    check_parts(caught.value, "scheem", "scheme")


def test_a_pattern_that_matches_nothing(tmp_path):
    with pytest.raises(ConfigError) as caught:
        from_pretrained(
            save(tmp_path, "untied"), quantization_config=QuantportConfig("int8", ignore=["head"])
        )
    check_parts(caught.value, "head", "lm_head")


def test_parts_on_disk(tmp_path):
    folder = save(tmp_path, "untied")
    parts = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    for device_map in ({**parts, "model.layers": "disk"}, {"": "disk"}):
        with pytest.raises(DeviceError) as caught:
            from_pretrained(folder, "int8", device_map=device_map, offload_folder=str(tmp_path / "disk"))
        check_parts(caught.value, "disk", "cpu")


def test_a_strategy_that_comes_to_disk(tmp_path):
    folder = save(tmp_path, "untied")
    with pytest.raises(DeviceError) as caught:
        from_pretrained(
            folder, "int8", device_map="auto", max_memory={"cpu": 15_000}, offload_folder=str(tmp_path)
        )
    check_parts(caught.value, "disk")


@pytest.mark.parametrize(
    "asked", [{"pp_size": 2}, {"tp_size": 2, "ep_size": 2}, {"tp_size": 2, "fsdp_size": 2}]
)
def test_shards_of_other_kinds(asked, tmp_path, monkeypatch):
    """Refused by every rank by itself, before any waits for another."""
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(**asked)
    monkeypatch.setattr(
        transformers.PreTrainedModel, "prepare_distribute_model", lambda config, **o: (config, None, None)
    )
    with pytest.raises(UnsupportedError) as caught:
        from_pretrained(save(tmp_path, "untied"), "int8", distributed_config=config)
    check_parts(caught.value, *(f"{k}={v}" for k, v in asked.items()), "one process")


def test_one_process_that_is_asked_for_as_a_group(tmp_path):
    from transformers.distributed import DistributedConfig

    folder = save(tmp_path, "untied")
    model = from_pretrained(folder, "int8", distributed_config=DistributedConfig())
    assert model.quantport_plan.shard is None
    same_state(model, from_pretrained(folder, "int8"))


def quantized_by_somebody(folder, **tensors):
    model = tiny("llama", tie_word_embeddings=False)
    checkpoint(folder, model, **tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "quantport", "scheme": "int8"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_checkpoint_that_somebody_quantized_under_our_name(tmp_path):
    codes = torch.ones(32, 32, dtype=torch.int8)
    folder = quantized_by_somebody(tmp_path, model__layers__0__self_attn__q_proj__weight=codes)
    for options in ({}, {"quantization_config": QuantportConfig("int8")}):
        with pytest.raises(CheckpointError) as caught:
            from_pretrained(folder, **options)
        check_parts(caught.value, "quantport", "quantized already")


def test_and_one_that_is_not_quantized_whatever_it_says(tmp_path):
    with pytest.raises(QuantportError):
        from_pretrained(quantized_by_somebody(tmp_path))


@pytest.mark.parametrize("mark", [{"quantized_by": "somebody"}, {"bits": 8}])
def test_marks_of_others_are_refused_as_ever(mark, tmp_path):
    folder = quantized_by_somebody(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": mark}))
    with pytest.raises(ValueError, match="quant_method"):
        from_pretrained(folder)


def test_a_state_dict_in_memory():
    model = tiny("llama")
    with pytest.raises(CheckpointError) as caught:
        transformers.LlamaForCausalLM.from_pretrained(
            None,
            config=model.config,
            state_dict=model.state_dict(),
            quantization_config=QuantportConfig("int8"),
        )
    check_parts(caught.value, "state_dict", "quantport.quantize_")


def test_shards_that_no_index_names(tmp_path):
    from quantport_transformers.checkpoint_files import one_path

    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    with pytest.raises(CheckpointError) as caught:
        one_path([str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")])
    check_parts(caught.value, str(tmp_path), "2 files", "complete")


def test_a_file_that_is_cut_off(tmp_path):
    folder = save(tmp_path, "untied")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError):
        from_pretrained(folder, "int8")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad, tmp_path):
    weight = torch.full((48, 32), 0.5, dtype=torch.bfloat16)
    weight[1, 2] = bad
    folder = checkpoint(tmp_path, tiny("llama"), model__layers__0__mlp__up_proj__weight=weight)
    with pytest.raises(QuantportError, match=r"layers\.0\.mlp\.up_proj"):
        from_pretrained(folder, "int8")


def test_a_model_without_linear_layers(tmp_path):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], architectures=["ResNetModel"]
    )
    model = transformers.ResNetModel(config)
    write(tmp_path, model.state_dict(), config__json=json.dumps(config.to_dict()))
    with pytest.raises(ConfigError, match="no layer can be quantized"):
        transformers.ResNetModel.from_pretrained(tmp_path, quantization_config=QuantportConfig("int8"))


def test_what_transformers_computes_from_several_tensors(tmp_path):
    """As quantport.load says it."""
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(QuantportError) as expected:
        quantport.load(tmp_path, "int8")
    with pytest.raises(QuantportError) as caught:
        from_pretrained(tmp_path, "int8")
    assert type(caught.value) is type(expected.value)


def test_registering_again_changes_nothing():
    before = {name: getattr(auto.AutoHfQuantizer, name) for name in ("supports_quant_method",)}
    for _ in range(3):
        quantport_transformers.register()
        importlib.reload(quantport_transformers)
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["quantport"] is QuantportConfig
    depth, method = 0, auto.AutoHfQuantizer.supports_quant_method
    while hasattr(method, "__wrapped__"):
        depth, method = depth + 1, method.__wrapped__
    assert depth == 1
    assert before["supports_quant_method"].__wrapped__ is method


@pytest.mark.slow
def test_the_import_that_is_missing_is_an_error_by_name(tmp_path):
    folder = save(tmp_path, "untied")
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, quantization_config="
        "{'quant_method': 'quantport', 'scheme': 'int8'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError: Unknown quantization type, got quantport" in done.stderr
