"""Spellings of vLLM and Transformers, and names of methods that are something else here."""

from __future__ import annotations

import json

import pytest
from core_references import check_parts
from transformers.quantizers.quantizers_utils import should_convert_module
from typer.testing import CliRunner

import quantport
from quantport.cli import app
from quantport.config import QuantConfig
from quantport.errors import ConfigError
from quantport.kvcache import cache_dtype
from quantport.model.patterns import MODULE, compile_pattern
from quantport.scheme.catalog import BUILTIN
from quantport.scheme.other_names import _FAMILIES, EXPLAINED, MEANINGS


def parse(value):
    return QuantConfig.parse(value, BUILTIN)


def refused(value, *named):
    with pytest.raises(ConfigError) as caught:
        parse(value)
    check_parts(caught.value, *named)
    text = str(caught.value)
    for word in ("pydantic", "Input should", "validation error", "Field required", "not permitted"):
        assert word not in text
    return caught.value


# what Transformers and vLLM write


@pytest.mark.parametrize("method", ["quant_method", "method", "quantization"])
@pytest.mark.parametrize("name", ["fp8", "FP8"])
def test_fp8_with_a_block_size_is_in_blocks(method, name):
    config = parse({method: name, "weight_block_size": [128, 128], "activation_scheme": "dynamic"})
    assert (config.scheme, config.weight_block_size) == ("fp8_per_block", (128, 128))
    assert parse({method: name}).scheme == parse({method: name, "weight_block_size": None}).scheme
    assert parse({method: name}).scheme == "fp8_per_tensor"


def test_a_configuration_as_a_checkpoint_stores_it():
    stored = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "float",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
    }
    config = parse(stored)
    assert config.scheme == "fp8_per_block"
    assert parse(config.model_dump(exclude_unset=True)) == config
    assert parse({"transformer": stored, "vae": None}).components["transformer"] == config


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"fmt": "e5m2"}, "fmt"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt"),
        ({"dequantize": True}, "dequantize"),
        ({"weight_block_size": [64, 64]}, "weight_block_size"),
        ({"activation_scheme": "static"}, "dynamic"),
    ],
)
def test_what_would_be_dropped_is_refused(more, named):
    refused({"quant_method": "fp8", **more}, named)
    refused({"quant_method": "int8", "fmt": "e4m3"}, "fmt")


# modules_to_not_convert

MODULES = (
    *("lm_head", "model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "model.layers.1"),
    *("model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj", "visual.blocks.0.attn.qkv", "decoder.fc1"),
    *("model.layers.3.mlp.experts.0.up_proj", "model.norm", "vision_tower.proj", "my_lm_head"),
)
KEYS = (
    *("lm_head", "model.layers.1", "mlp.gate", "gate", "visual", "fc1", "model.layers.*", "vis.*|lm_head"),
    *("model", "proj", ".", "model.layers.[01].mlp", "layers", "q_proj", "experts.0", ""),
)


@pytest.mark.parametrize("key", KEYS)
def test_modules_are_matched_as_transformers_matches_them(key):
    (pattern,) = parse({"modules_to_not_convert": [key]}).ignore
    assert pattern == MODULE + key
    matched = [name for name in MODULES if compile_pattern(pattern).match(name)]
    assert matched == [name for name in MODULES if not should_convert_module(name, [key])]


def test_modules_that_are_none_and_modules_that_are_wrong():
    assert parse({"modules_to_not_convert": None}).ignore == ()
    refused({"modules_to_not_convert": "lm_head"}, "ignore", "a list")
    refused({"modules_to_not_convert": ["*.mlp"]}, "module:*.mlp", "regular expression")
    refused({"modules_to_not_convert": ["a"], "ignore": ["b"]}, "ignore")


# names

ALIASES = [name for scheme in BUILTIN.values() for name in (scheme.name, *scheme.aliases)]


@pytest.mark.parametrize("name", ALIASES)
def test_names_in_upper_case(name):
    assert BUILTIN[name.upper()] is BUILTIN[name]
    assert parse(name.upper()).scheme == parse({"linear": name.title()}).linear == BUILTIN[name].name


def test_names_of_the_cache_in_upper_case():
    assert cache_dtype("FP8_E4M3") is cache_dtype("fp8")


@pytest.mark.parametrize("name", [*EXPLAINED, *_FAMILIES])
def test_methods_of_others_are_explained(name):
    assert name not in BUILTIN
    nearest = EXPLAINED[_FAMILIES.get(name, name)][1]
    assert all(scheme in BUILTIN for scheme in nearest)
    for value in (name, {"quant_method": name, "bits": 4}, {"vae": {"method": name, "x": 1}}):
        refused(value, name, nearest[0])
    refused(name.upper(), name.upper(), nearest[0])


def test_what_a_plugin_calls_so_is_a_scheme_of_its_own():
    from dataclasses import replace

    from quantport.scheme.catalog import Schemes

    schemes = Schemes([*BUILTIN.values(), replace(BUILTIN["int8"], name="awq", aliases=())])
    assert QuantConfig.parse("awq", schemes).scheme == "awq"
    with pytest.raises(ConfigError, match="'bits'"):
        QuantConfig.parse({"method": "awq", "bits": 4}, schemes)


@pytest.mark.parametrize("name", MEANINGS)
def test_suggestions_by_meaning(name):
    assert name not in BUILTIN
    assert MEANINGS[name] in BUILTIN
    refused(name, f"'{MEANINGS[name]}'", "nearest in meaning")


@pytest.mark.parametrize(
    "name",
    [
        "int8_per_channel",
        "INT8_per_tensor",
        "int4-per-block",
        "int4_awq",
        "nvfp4_per_block",
        "mxfp8_per_token",
    ],
)
def test_suggestions_have_the_numbers_that_were_asked_for(name):
    with pytest.raises(ConfigError) as caught:
        BUILTIN[name]
    suggested = caught.value.suggestion.split("'")[1]
    numbers = BUILTIN[name.lower().replace("-", "_").split("_")[0]].weight.format
    assert BUILTIN[suggested].weight.format == numbers


# no text of pydantic, and JSON under --json


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"fallback": 3}, "one of 'weight_only', 'error' or 'reference'"),
        ({"ignore": 3}, "a list"),
        ({"ignore": [3]}, "a text"),
        ({"targets": []}, "an object"),
        ({"components": {"a": 3}}, "an object"),
        ({"scheme": ["int8"]}, "a text"),
        ({"num_bf16_fallback_layers": -1}, "at least 0"),
        ({"num_bf16_fallback_layers": 1.5}, "a whole number"),
        ({"weight_block_size": [1, 2, 3]}, "at most 2"),
        ({"weight_block_size": [128]}, "weight_block_size"),
        ({"kv_cache_skip_layers": ["x"]}, "a whole number"),
        ({"scheme": 10**5000}, "a text"),
    ],
)
def test_errors_are_in_words_of_ours(value, named):
    refused(value, named)


@pytest.mark.parametrize("args", [("--json",), ("--format", "json"), ("-f", "json")], ids=" ".join)
@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (("plan", "/no/such/place"), "CheckpointError"),
        (("matrix", "--scheme", "awq"), "ConfigError"),
        (("bench", "--device", "gaudi"), "DeviceError"),
    ],
    ids=lambda x: x[0],
)
def test_errors_are_json_where_json_is_asked_for(command, kind, args):
    done = CliRunner().invoke(app, [*command, *args])
    assert (done.exit_code, done.stderr) == (2, "")
    error = json.loads(done.stdout)["error"]
    assert error["type"] == kind
    assert list(error) == ["type", "asked", "found", "try"]
    assert all(error.values())
    plain = CliRunner().invoke(app, [*command])
    assert (plain.exit_code, plain.stdout) == (2, "")
    assert error["found"].split()[0] in plain.stderr


def test_a_configuration_file_is_read_within_the_limits(tmp_path):
    config = tmp_path / "c.json"
    model = tmp_path / "absent"
    for text, found in ((b"[" * 200_000, "levels"), (b'{"a":1,"a":2}', "twice"), (b"9" * 9000, "not JSON")):
        config.write_bytes(text)
        done = CliRunner().invoke(app, ["plan", str(model), "--config", str(config), "--json"])
        error = json.loads(done.stdout)["error"]
        assert (done.exit_code, error["type"]) == (2, "ConfigError")
        assert found in error["found"] or "JSON" in error["found"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"schema": "int8"}, "did you mean 'scheme'"),
        ({"fallback": 3}, "'weight_only'"),
        ({"components": {"vae": {"skeme": "int8"}}}, "components.vae.skeme"),
    ],
)
def test_a_configuration_that_is_made_without_parsing(settings, named):
    with pytest.raises(ConfigError) as caught:
        quantport.QuantConfig(**settings)
    check_parts(caught.value, named)
    assert quantport.QuantConfig(ignore=["lm_head"]).ignore == ("lm_head",)
