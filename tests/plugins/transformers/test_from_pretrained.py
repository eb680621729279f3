"""One line loads: the bits are those of ``quantport.load``, whatever the model and the scheme."""

from __future__ import annotations

import copy
import json
import logging
import pickle

import pytest
import torch
from core_models import DENSE, same_bits, same_state
from core_tiny import tiny_model
from core_transformers import checkpoint, tiny
from hf_models import IDS, QuantportConfig, from_pretrained, logits, save, transformers

import quantport
from quantport.modules import QuantEmbedding, QuantExperts, QuantLinear, QuantModule

SCHEMES = ["int8", "fp8_per_block", "int4", "nf4", "mxfp4"]
KINDS = ["tied", "untied", "moe"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_those_of_load(kind, scheme, tmp_path):
    folder = save(tmp_path, kind)
    found, expected = from_pretrained(folder, scheme), quantport.load(folder, scheme, device="cpu")
    same_state(found, expected)
    assert torch.equal(logits(found), logits(expected))
    assert (found.training, found.dtype) == (False, torch.bfloat16)
    assert any(isinstance(m, QuantExperts) for m in found.modules()) == (kind == "moe")


@pytest.mark.parametrize("kind", ["qwen2", "gemma", "opt", "glm4_moe", "deepseek_v3"])
def test_the_bits_of_other_classes(kind, tmp_path):
    folder = checkpoint(tmp_path, tiny(kind))
    same_state(from_pretrained(folder, "int8"), quantport.load(folder, "int8", device="cpu"))


# experts that are transposed, interleaved, with biases or a gate of their own, or stacked in one
EXPERTS = ["GptOssForCausalLM", "Llama4ForCausalLM", "GraniteMoeForCausalLM", "MixtralForCausalLM"]


@pytest.mark.parametrize("scheme", ["int8_weight_only", {"scheme": "int8_weight_only", "moe": None}], ids=str)
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_of_every_form(name, scheme, tmp_path):
    tiny_model(name).save_pretrained(tmp_path)
    config = {"scheme": scheme} if isinstance(scheme, str) else scheme
    asked = QuantportConfig(**config)
    model = getattr(transformers, name).from_pretrained(tmp_path, quantization_config=asked)
    same_state(model, quantport.load(tmp_path, config=config, device="cpu"))
    assert any(isinstance(m, QuantExperts) for m in model.modules()) == isinstance(scheme, str)


def test_a_model_without_a_head_is_loaded_from_a_checkpoint_with_one(tmp_path):
    folder = save(tmp_path, "untied")
    with pytest.warns(UserWarning, match="no place for them: lm_head"):
        model = transformers.AutoModel.from_pretrained(folder, quantization_config=QuantportConfig("int8"))
    expected = quantport.load(folder, "int8", device="cpu").model
    same_state(model, expected)


def test_and_a_head_that_the_checkpoint_has_not_is_drawn(tmp_path):
    tiny("llama").model.save_pretrained(tmp_path)
    cls = transformers.AutoModelForSequenceClassification
    model, info = cls.from_pretrained(
        tmp_path, num_labels=3, quantization_config=QuantportConfig("int8"), output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"}
    assert info["unexpected_keys"] == set()
    assert type(model.score) is torch.nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)


def test_nothing_is_said_to_be_missing_or_unexpected_that_is_loaded(tmp_path):
    for kind in KINDS:
        folder = save(tmp_path / kind, kind)
        model, info = from_pretrained(folder, "int8", output_loading_info=True)
        assert not any(info.values()), (kind, info)
        plain = from_pretrained(folder)
        for name in ("_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing"):
            assert getattr(model, name) == getattr(plain, name)


def test_a_bias_that_the_checkpoint_has_not_is_zero(tmp_path):
    name = "model__layers__0__self_attn__q_proj__bias"
    folder = checkpoint(tmp_path, tiny("qwen2"), **{name: None})
    model, info = from_pretrained(folder, "int8", output_loading_info=True)
    assert info["missing_keys"] == {name.replace("__", ".")}
    assert not model.model.layers[0].self_attn.q_proj.bias.any()
    assert model.model.layers[1].self_attn.q_proj.bias.all()


def test_what_is_unexpected_is_named_still(tmp_path):
    folder = checkpoint(tmp_path, tiny("llama"), extra__weight=torch.ones(2, dtype=torch.bfloat16))
    with pytest.warns(UserWarning, match="no place for them: extra"):
        _, info = from_pretrained(folder, "int8", output_loading_info=True)
    assert info["unexpected_keys"] == {"extra.weight"}


def test_and_where_nothing_is_quantized(tmp_path):
    folder = checkpoint(tmp_path, tiny("llama"), extra__weight=torch.ones(2, dtype=torch.bfloat16))
    nothing = QuantportConfig("int8", ignore=["model.*"])
    with pytest.warns(UserWarning, match="no place for them: extra"):
        model, info = from_pretrained(
            folder, quantization_config=nothing, dtype=torch.float32, output_loading_info=True
        )
    assert not any(isinstance(module, QuantModule) for module in model.modules())
    assert info["unexpected_keys"] == {"extra.weight"}


@pytest.mark.parametrize("shape", [(32, 16), (16, 32), (1, 1)])
def test_a_weight_of_another_shape_is_refused(shape, tmp_path):
    wrong = {"model__layers__0__mlp__down_proj__weight": torch.ones(shape, dtype=torch.bfloat16)}
    with pytest.raises(quantport.QuantportError, match="down_proj"):
        from_pretrained(checkpoint(tmp_path, tiny("llama"), **wrong), "int8")


def test_the_dict_form_is_the_same(tmp_path):
    folder = save(tmp_path, "untied")
    asked = {"quant_method": "quantport", "scheme": "int8", "ignore": ["*.down_proj"]}
    model = from_pretrained(folder, quantization_config=asked)
    same_state(model, from_pretrained(folder, quantization_config=QuantportConfig.from_dict(asked)))
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)


EVERY_KEY = {
    "scheme": "int8",
    "linear": "fp8_per_block",
    "moe": "int4_weight_only_g32",
    "ignore": ["*.0.self_attn.o_proj"],
    "targets": {"lm_head": "int8_weight_only", "model.layers.1.*": "nf4"},
    "fallback": "reference",
    "on_unmatched": "error",
    "nonfinite": "zero",
    "cast": ["model.norm.weight"],
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "group_size": 32,
    "num_bf16_fallback_layers": 0,
    "kv_cache_dtype": "int8",
    "kv_cache_skip_layers": [0],
}


def test_every_key_is_taken_and_comes_back(tmp_path):
    assert set(EVERY_KEY) | {"components"} == set(quantport.QuantConfig.model_fields)
    config = QuantportConfig(**EVERY_KEY)
    again = QuantportConfig.from_dict(json.loads(config.to_json_string()))
    assert again == config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config))
    assert dict(config) == config.to_dict()
    folder = save(tmp_path, "moe")
    same_state(
        from_pretrained(folder, quantization_config=config),
        quantport.load(folder, config=EVERY_KEY, device="cpu"),
    )


def test_components_are_taken(tmp_path):
    folder = save(tmp_path, "untied")
    config = {"components": {"model": {"scheme": "int8"}, "lm_head": None}}
    model = from_pretrained(folder, quantization_config=QuantportConfig(**config))
    same_state(model, quantport.load(folder, config=config, device="cpu"))


def test_a_device_chooses_where_no_scheme_is_given(tmp_path):
    folder = save(tmp_path, "untied")
    model = from_pretrained(folder, quantization_config=QuantportConfig())
    same_state(model, quantport.load(folder, device="cpu"))
    assert model.quantport_plan.why


def test_the_plan_is_on_the_model_and_logged_once(tmp_path, caplog):
    folder = save(tmp_path, "moe")
    with caplog.at_level(logging.INFO, logger="quantport_transformers"):
        model = from_pretrained(folder, "int8")
    expected = quantport.load(folder, "int8", device="cpu").quantport_plan
    assert [s.scheme for s in model.quantport_plan.steps] == [s.scheme for s in expected.steps]
    assert [r.getMessage() for r in caplog.records] == [str(model.quantport_plan)]
    assert str(folder) in str(model.quantport_plan)


ENDS = ("model.embed_tokens", "lm_head")


def test_an_embedding_and_the_head_that_is_tied_to_it(tmp_path):
    folder = save(tmp_path, "tied")
    config = {"scheme": "int8", "targets": dict.fromkeys(ENDS, "int8_weight_only")}
    model = from_pretrained(folder, quantization_config=QuantportConfig(**config))
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    expected = quantport.load(folder, config=config, device="cpu")
    same_state(model, expected)
    assert torch.equal(logits(model), logits(expected))


def test_a_tied_head_stays(tmp_path):
    folder = save(tmp_path, "tied")
    model = from_pretrained(folder, "int8")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for one in ENDS:
        with pytest.raises(quantport.QuantportError, match="one tied weight under 2 names"):
            from_pretrained(folder, quantization_config=QuantportConfig("int8", targets={one: "int8"}))


def test_ends_that_differ_in_the_file_are_not_tied_whatever_the_configuration_says(tmp_path):
    other = torch.ones(96, 32, dtype=torch.bfloat16)
    folder = checkpoint(tmp_path, tiny("llama", tie_word_embeddings=True), lm_head__weight=other)
    with pytest.warns(UserWarning, match="they are not tied"):
        model = from_pretrained(folder, "int8")
    with pytest.warns(UserWarning, match="they are not tied"):
        same_state(model, quantport.load(folder, "int8", device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_codes_do_not_depend_on_the_dtype_that_is_computed_in(dtype, tmp_path):
    folder = save(tmp_path, "untied")
    model, expected = (
        from_pretrained(folder, "int8", dtype=dtype),
        quantport.load(folder, "int8", dtype=dtype),
    )
    same_state(model, expected)
    assert model.dtype is model.model.layers[0].mlp.up_proj.dtype is dtype


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_weights_are_quantized_as_they_are_stored(stored, tmp_path):
    folder = checkpoint(tmp_path, tiny("llama", stored, tie_word_embeddings=False))
    model = from_pretrained(folder, "int8", dtype=torch.bfloat16)
    same_state(model, quantport.load(folder, "int8", dtype=torch.bfloat16, device="cpu"))


def test_casting_a_model_casts_no_scale(tmp_path):
    model = from_pretrained(save(tmp_path, "untied"), "int8")
    stored = {n: t.clone() for n, t in model.model.layers.state_dict().items() if "weight" in n}
    model.to(torch.float16)
    for name, tensor in model.model.layers.state_dict().items():
        if "norm" not in name:
            assert same_bits(tensor, stored[name]), name
    assert logits(model).isfinite().all()


def test_sizes_are_those_of_what_is_held(tmp_path):
    folder = save(tmp_path, "moe")
    plain, model = from_pretrained(folder), from_pretrained(folder, "int8")
    assert model.num_parameters() == plain.num_parameters()
    assert model.get_memory_footprint() == quantport.load(folder, "int8").get_memory_footprint()
    assert model.get_memory_footprint() < plain.get_memory_footprint()


def test_a_copy_and_a_pickle(tmp_path):
    model = from_pretrained(save(tmp_path, "moe"), "int4")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same_state(other, model)
        assert torch.equal(logits(other), logits(model))


def test_files_are_closed(tmp_path, monkeypatch):
    from quantport.checkpoint import Checkpoint

    closed, close = [], Checkpoint.close
    monkeypatch.setattr(Checkpoint, "close", lambda self: closed.append(self) or close(self))
    model = from_pretrained(save(tmp_path, "untied"), "int8")
    assert len(closed) == 1
    assert model.hf_quantizer._load is None


def test_a_variant_and_pytorch_files_are_what_is_read(tmp_path):
    model, folder = tiny("llama", tie_word_embeddings=False), tmp_path / "variant"
    model.save_pretrained(folder, variant="v", max_shard_size="20KB")
    (folder / "other-00001-of-00001.safetensors").write_bytes(b"not read")
    expected = from_pretrained(save(tmp_path / "plain", "untied"), "int8")
    same_state(from_pretrained(folder, "int8", variant="v"), expected)
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    for weights_only in (True, False):
        found = from_pretrained(tmp_path / "bin", "int8", weights_only=weights_only)
        same_state(found, expected)


def test_a_key_mapping_is_followed(tmp_path):
    folder = save(tmp_path / "plain", "untied")
    model = tiny("llama", tie_word_embeddings=False)
    state = {name.replace("self_attn", "attention"): t for name, t in model.state_dict().items()}
    from core_models import write

    other = write(tmp_path / "other", state, config__json=(folder / "config.json").read_text())
    found = from_pretrained(other, "int8", key_mapping={"attention": "self_attn"})
    same_state(found, from_pretrained(folder, "int8"))


def test_a_quantized_cache_is_made(tmp_path):
    model = from_pretrained(
        save(tmp_path, "untied"), quantization_config=QuantportConfig("int8", kv_cache_dtype="int8")
    )
    cache = model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True).past_key_values
    assert type(cache).__module__.startswith("quantport")


def test_the_bundled_model_writes_what_load_writes():
    found, expected = from_pretrained(DENSE, "int8"), quantport.load(DENSE, "int8", device="cpu")
    options = {"max_new_tokens": 8, "do_sample": False}
    assert found.generate(IDS, **options).tolist() == expected.generate(IDS, **options).tolist()
    assert any(isinstance(m, QuantModule) for m in found.modules())
