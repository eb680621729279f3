"""The quantized KV cache in models: ``generate`` in its modes, the default of a loaded model, plan, save and
command line.
"""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
from core_models import DENSE, MOE
from test_cli import ask, parts
from torch import nn

import quantport
from quantport.cli import compare
from quantport.errors import ConfigError, QuantportError
from quantport.kvcache.layers import KVCache
from quantport.loading.kv_caches import default_of

transformers = pytest.importorskip("transformers")
NAMES = ("fp8_e4m3", "fp8_e5m2", "int8", "int4")
IDS = torch.arange(5, 45).view(2, 20) * 37 % 2000
FP8 = {"scheme": "int8_weight_only", "kv_cache_dtype": "fp8", "kv_cache_skip_layers": [0, -1]}


@pytest.fixture(scope="module", params=[DENSE, MOE], ids=lambda p: p.name)
def model(request):
    """In fp32, so that equal mathematics gives equal tokens."""
    return transformers.AutoModelForCausalLM.from_pretrained(request.param, dtype=torch.float32).eval()


@pytest.fixture
def loaded():
    return quantport.load(DENSE, config=FP8)


def generate(model, cache=None, ids=IDS, **options):
    torch.manual_seed(0)
    settings = {"max_new_tokens": 10, "do_sample": False, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings)


def logits(model, cache=None, ids=IDS):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_close_and_closer_with_more_bits(model, name):
    expected = logits(model)
    error = (logits(model, quantport.kv_cache(model, name)) - expected).norm() / expected.norm()
    skipping = (
        logits(model, quantport.kv_cache(model, name, skip_layers=(0, -1))) - expected
    ).norm() / expected.norm()
    assert 1e-6 < skipping < error < {"fp8_e4m3": 0.03, "fp8_e5m2": 0.06, "int8": 0.01, "int4": 0.13}[name]


def test_16_bits_are_those_of_transformers(model):
    for size in (None, 30):
        assert torch.equal(logits(model, quantport.kv_cache(model, "auto", max_length=size)), logits(model))


@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_the_same_tokens(model, name):
    """Growing, of fixed size, in chunks of the prompt, step by step, and with drafts that are partly thrown
    away.
    """
    cache = quantport.kv_cache(model, name)
    expected = generate(model, cache)
    assert cache.get_seq_length() == expected.shape[1] - 1
    assert torch.equal(generate(model, quantport.kv_cache(model, name, max_length=30)), expected)
    assert torch.equal(generate(model, quantport.kv_cache(model, name), prefill_chunk_size=7), expected)
    single = generate(model, quantport.kv_cache(model, name), IDS[:1])
    for draft in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model}):
        for size in (None, 40):
            assert torch.equal(
                generate(model, quantport.kv_cache(model, name, max_length=size), IDS[:1], **draft), single
            )


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "top_k": 20}]
)
@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_beams_and_samples(model, name, options):
    growing = generate(model, quantport.kv_cache(model, name), **options)
    assert torch.equal(generate(model, quantport.kv_cache(model, name, max_length=30), **options), growing)
    assert growing.shape == (2 * options.get("num_return_sequences", 1), 30)


def test_a_cache_that_is_too_short_says_so_and_holds_nothing():
    model = quantport.load(DENSE, "int8")
    cache = quantport.kv_cache(model, "fp8", max_length=12)
    with pytest.raises(ConfigError, match="it holds 0 of max_length=12") as caught:
        generate(model, cache)
    assert "max_length=20 or more" in caught.value.suggestion
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    generate(model, cache, IDS[:, :8], max_new_tokens=5)  # 8 + 5 tokens, of which the last is never fed back
    with pytest.raises(ConfigError, match="it holds 12"):
        logits(model, cache, IDS[:, :1])
    assert {layer.get_seq_length() for layer in cache.layers} == {12}


def used(model, **options):
    return generate(model, return_dict_in_generate=True, **options).past_key_values


def test_a_loaded_model_quantizes_its_cache_by_default(loaded):
    first, second = used(loaded), used(loaded)
    assert type(first) is type(second) is KVCache
    assert first is not second
    assert [layer.kind.name for layer in first.layers] == ["auto", *["fp8_e4m3"] * 4, "auto"]
    assert torch.equal(
        generate(loaded), generate(loaded, quantport.kv_cache(loaded, "fp8", skip_layers=(0, -1)))
    )
    assert loaded.quantport_plan.kv_cache["bytes_per_token"] == 4 * 272 + 2 * 512


def test_what_the_caller_says_wins(loaded):
    own = quantport.kv_cache(loaded, "int4")
    assert used(loaded, cache=own) is own
    assert used(loaded, use_cache=False) is None
    assert default_of(quantport.load(DENSE, "int8")) is None
    assert (
        type(used(quantport.load(DENSE, config={"scheme": "int8", "kv_cache_dtype": "auto"})))
        is transformers.DynamicCache
    )


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"max_new_tokens": 3}], ids=str)
def test_a_cache_of_fixed_size_is_quantized_too(loaded, options):
    cache = used(loaded, cache_implementation="static", **options)
    assert type(cache) is KVCache
    assert cache.max_length == 20 + options.get("max_new_tokens", 10) - 1
    assert [layer.kind.name for layer in cache.layers] == ["auto", *["fp8_e4m3"] * 4, "auto"]
    assert torch.equal(
        generate(loaded, cache_implementation="static", **options), generate(loaded, **options)
    )


def test_a_cache_that_cannot_be_quantized_is_refused_by_name(loaded, monkeypatch):
    class Other(transformers.cache_utils.DynamicCache):
        """As of a model or a library that quantizes by itself."""

    def prepare(self, generation_config, model_kwargs, *args):
        model_kwargs["past_key_values"] = Other(config=self.config)

    monkeypatch.setattr(type(loaded), "_prepare_cache_for_generation", prepare)
    with pytest.raises(ConfigError, match="makes a Other, and the model has kv_cache_dtype 'fp8_e4m3'"):
        generate(loaded)


def test_other_models_keep_their_cache(loaded):
    other = transformers.AutoModelForCausalLM.from_pretrained(DENSE)
    assert type(used(other)) is transformers.DynamicCache


def test_copies_and_pickles_have_their_own_default(loaded):
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert default_of(twin).model is twin
        assert torch.equal(generate(twin), generate(loaded))
    alive = weakref.ref(twin)
    gc.disable()
    try:
        del twin
        assert alive() is None, "no cycle keeps a deleted model"
    finally:
        gc.enable()


def test_quantize_in_memory():
    model = transformers.AutoModelForCausalLM.from_pretrained(MOE).eval()
    plan = quantport.quantize_(model, "int8_weight_only", config={"kv_cache_dtype": "int8"})
    assert plan.kv_cache["bytes_per_token"] == 4 * 2 * 4 * 34
    assert used(model).layers[0].kind.name == "int8"


def test_a_model_without_such_a_cache_is_refused_before_anything_is_done():
    net = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    with pytest.raises(ConfigError, match="no Transformers configuration"):
        quantport.quantize_(net, "int8", config={"kv_cache_dtype": "fp8"})
    assert type(net[0]) is nn.Linear
    base = transformers.AutoModel.from_pretrained(DENSE)
    base.config.is_encoder_decoder = True
    with pytest.raises(ConfigError, match="an encoder and a decoder"):
        quantport.quantize_(base, "int8", config={"kv_cache_dtype": "fp8"})
    assert not hasattr(base, "quantport_plan")
    with pytest.raises(ConfigError, match="9 is none of the 6 layers"):
        quantport.load(DENSE, config={"scheme": "int8", "kv_cache_dtype": "fp8", "kv_cache_skip_layers": [9]})


def test_it_is_saved_and_may_change(loaded, tmp_path):
    folder = quantport.save(loaded, tmp_path / "out")
    again = quantport.load(folder)
    assert (default_of(again).dtype, default_of(again).skip_layers) == ("fp8_e4m3", (0, -1))
    assert torch.equal(generate(again), generate(loaded))
    assert default_of(quantport.load(folder, config={"kv_cache_dtype": "int4"})).skip_layers == ()
    assert default_of(quantport.load(folder, config={"kv_cache_dtype": None})) is None
    with pytest.raises(ConfigError, match="quantized already"):
        quantport.load(folder, config={"kv_cache_dtype": "fp8", "ignore": ["*"]})
    record = json.loads((folder / "quantport.json").read_text())
    (folder / "quantport.json").write_text(json.dumps({**record, "kv_cache_dtype": "int3"}))
    with pytest.raises(QuantportError, match="int3"):
        quantport.load(folder)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"kv_cache_dtype": "fp7"}, "no such dtype"),
        ({"kv_cache_dtype": 8}, "type int\ntry: a text"),
        ({"kv_cache_dtype": "fp8", "kv_cache_skip_layers": ["first"]}, "type str\ntry: a whole number"),
        ({"kv_cache_dtype": "fp8", "kv_cache_skip_layers": [-7]}, "-7 is none of the 6 layers"),
        ({"kv_cache_skip_layers": [0]}, "every layer stays in 16 bits already"),
        ({"components": {"model": {"kv_cache_dtype": "fp8"}, "lm_head": None}}, "holds for the whole model"),
    ],
)
def test_configurations_that_are_wrong(config, found):
    with pytest.raises(ConfigError, match=found):
        quantport.plan(DENSE, config={"scheme": "int8", **config} if "components" not in config else config)


def test_the_plan_counts():
    plan = quantport.plan(DENSE, "int8", config={"kv_cache_dtype": "fp8"}, device="cuda:sm_90")
    assert plan.config.kv_cache_dtype == "fp8_e4m3"
    expected = {"dtype": "fp8_e4m3", "skip_layers": [], "bytes_per_token": 1632, "bytes_per_token_bf16": 3072}
    assert plan.to_dict()["kv_cache"] == expected
    module = transformers.AutoModelForCausalLM.from_pretrained(MOE)
    assert quantport.plan(module, "int8").kv_cache["bytes_per_token"] == 2048
    unknown = quantport.plan(nn.Sequential(nn.Linear(8, 8)), "int8").kv_cache
    assert unknown["bytes_per_token"] is unknown["bytes_per_token_bf16"] is None


def test_perplexity_is_measured_through_the_cache(loaded):
    base = transformers.AutoModelForCausalLM.from_pretrained(DENSE).eval()
    windows = IDS.flatten()[None]
    plain = quantport.load(DENSE, "int8_weight_only")
    through, around = (compare.quality(m, base, windows, lambda *_: None) for m in (loaded, plain))
    assert 0 < abs(through["perplexity"] / around["perplexity"] - 1) < 0.05


def test_the_command_line(tmp_path):
    text = ask("plan", DENSE, "--scheme", "int8", "--kv-cache", "int4").stdout
    assert "KV cache: 3072 -> 864 bytes per token (72% less), int4" in text
    assert "KV cache: 3072 bytes per token, in 16 bits" in ask("plan", DENSE, "--scheme", "int8").stdout
    settings = tmp_path / "config.json"
    settings.write_text(json.dumps({"scheme": "int8", "kv_cache_dtype": "int4", "kv_cache_skip_layers": [0]}))
    assert "layers 0 in 16 bits" in ask("plan", DENSE, "--config", settings).stdout
    assert (
        "one of them" in parts(ask("plan", DENSE, "--config", settings, "--kv-cache", "fp8", code=2))["try"]
    )
    assert "no such dtype" in parts(ask("plan", DENSE, "--kv-cache", "fp9", code=2))["found"]
    call = (
        "run",
        MOE,
        "--scheme",
        "int8",
        "--kv-cache",
        "fp8",
        "--compare",
        "--tokens",
        "4",
        "--windows",
        "1",
        "--json",
    )
    compare = json.loads(ask(*call).stdout)["compare"]
    assert compare["kv_cache"]["bytes_per_token"] == 1088
    assert compare["perplexity"] < 1.1 * compare["perplexity_bf16"]
