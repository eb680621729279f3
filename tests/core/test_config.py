"""QuantConfig: every key, every spelling, every conflict; a clear error for everything else."""

from __future__ import annotations

import pytest
import torch
from core_references import check_parts

from quantport.config import QuantConfig
from quantport.config.resolve import resolve
from quantport.errors import ConfigError
from quantport.model.layers import Layer
from quantport.model.patterns import compile_pattern
from quantport.model.roles import SkipCode
from quantport.scheme import Quant, Scheme
from quantport.scheme.catalog import BUILTIN, Schemes

BAD = ["re:(", "re:[", "re:*a", "re:(?P<x>a)(?P<x>b)", "re:a{99999999999999999999}", f"re:{'(' * 9999}"]


def parse(value):
    return QuantConfig.parse(value, BUILTIN)


def refused(value, *named):
    with pytest.raises(ConfigError) as caught:
        parse(value)
    check_parts(caught.value, *named)
    return caught.value


def test_defaults():
    config = parse(None)
    assert (config.scheme, config.ignore, config.targets, config.components) == (None, (), {}, {})
    assert (config.fallback, config.on_unmatched, config.nonfinite, config.activation_scheme) == (
        "weight_only",
        "error",
        "error",
        "dynamic",
    )
    assert parse({}) == parse(QuantConfig()) == config


def test_every_key_of_ours():
    config = parse(
        {
            "scheme": "int8",
            "linear": "fp8",
            "moe": "int4_wo",
            "ignore": ["lm_head", "*.mlp.*", "re:.*q_proj"],
            "targets": {"a.b": "int4_g32", "c": None},
            "fallback": "error",
            "on_unmatched": "warn",
            "nonfinite": "zero",
            "activation_scheme": "dynamic",
            "weight_block_size": None,
            "group_size": None,
        }
    )
    assert (config.scheme, config.linear, config.moe) == ("int8", "fp8_per_tensor", "int4_weight_only")
    assert config.targets == {"a.b": "int4_weight_only_g32", "c": None}
    assert config.patterns() == ("lm_head", "*.mlp.*", "re:.*q_proj", "a.b", "c")


@pytest.mark.parametrize("key", ["scheme", "method", "quant_method", "quantization", "global_scheme"])
@pytest.mark.parametrize("alias", [a for s in BUILTIN.values() for a in (s.name, *s.aliases)])
def test_spellings_of_the_scheme(key, alias):
    assert parse({key: alias}).scheme == parse(alias).scheme == BUILTIN[alias].name


@pytest.mark.parametrize("value", [None, "none"])
def test_no_scheme(value):
    assert parse(value).scheme is None
    assert parse({"method": value}).scheme is None


@pytest.mark.parametrize(
    ("old", "new"), [("linear_scheme_override", "linear"), ("moe_scheme_override", "moe")]
)
def test_old_overrides(old, new):
    assert parse({old: "int8"}) == parse({new: "int8"})


def test_old_ignore():
    assert parse({"ignored_layers": ["lm_head"]}) == parse({"ignore": ["lm_head"]})


@pytest.mark.parametrize(
    ("vllm", "scheme"),
    [
        ("fp8_per_tensor_static", "fp8_per_tensor"),
        ("fp8_per_channel_static", "fp8_per_channel"),
        ("fp8_per_block_static", "fp8_per_block"),
        ("int8_per_channel_static", "int8_weight_only"),
        ("int4", "int4_weight_only"),
    ],
)
def test_vllm_weight_spelling(vllm, scheme):
    assert parse({"linear": {"weight": vllm}}).linear == parse({"moe": {"weight": vllm}}).moe == scheme


@pytest.mark.parametrize(
    ("weight", "activation", "scheme"),
    [
        ("int8_per_channel_static", "int8_per_token_dynamic", "int8"),
        ("int8_per_channel_static", None, "int8_weight_only"),
        ("fp8_per_tensor_static", "fp8_per_token_dynamic", "fp8_per_tensor"),
        ("fp8_per_channel_static", "fp8_per_token", "fp8_per_channel"),
        ("fp8_per_channel_static", None, "fp8_weight_only"),
        ("fp8_per_block_static", "fp8_per_block_dynamic", "fp8_per_block"),
        ("int4", "int8_per_token", "int4_w4a8"),
        ("mxfp4", "mxfp8", "mxfp4_w4a8"),
        ("mxfp4:floor", "mxfp8", "mxfp4_w4a8:floor"),
        ("mxfp4", None, "mxfp4_weight_only"),
        ("mxfp8", "mxfp8", "mxfp8"),
        ("nvfp4", "nvfp4_per_token", "nvfp4"),
        (None, None, None),
    ],
)
def test_vllm_spelling_of_weights_and_activations(weight, activation, scheme):
    both = {"weight": weight, "activation": activation}
    assert parse({"linear": both}).linear == parse({"components": {"a": {"moe": both}}}).components["a"].moe
    assert parse({"linear": both}).linear == scheme
    assert "linear" in parse({"linear": both}).model_fields_set


@pytest.mark.parametrize(
    ("weight", "activation", "named"),
    [
        ("int8", "nonsense", ["'nonsense'", "int8_per_token"]),
        ("fp8_per_tensor_static", "fp8_per_tensor_dynamic", ["fp8_per_tensor_dynamic", "fp8_per_token"]),
        ("fp8_per_tensor_static", None, ["fp8_per_tensor_static", "None", "fp8_per_tensor ("]),
        ("int4", "fp8_per_token", ["int4_weight_only (", "int4_w4a8 ("]),
        ("int8", "mxfp8", ["int8 (", "int8_weight_only ("]),
        ("int9", "int8_per_token", ["int9", "int8"]),
        (None, "int8_per_token", ["None"]),
        ("int8", 8, ["8", "int8_per_token"]),
        ("int8", ["mxfp8"], ["mxfp8"]),
    ],
)
def test_activations_that_no_scheme_has_are_refused(weight, activation, named):
    both = {"weight": weight, "activation": activation}
    refused({"linear": both}, *named)
    refused({"components": {"a": {"moe": both}}}, *named)


def test_activations_of_a_scheme_that_a_plugin_brings():
    mine = Scheme("mine", Quant("e3m2", (1, 64)), BUILTIN["int8"].activation, "")
    schemes = Schemes((*BUILTIN.values(), mine))
    both = {"weight": "mine", "activation": "int8_per_token"}
    assert QuantConfig.parse({"moe": both}, schemes).moe == "mine"


@pytest.mark.parametrize("value", [{}, {"activation": "fp8"}])
def test_vllm_spelling_without_a_weight_is_no_silent_null(value):
    refused({"linear": value}, "linear")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("int9", ["int8", "known"]),
        ({"schema": "int8"}, ["'schema'", "did you mean 'scheme'"]),
        ({"ignored": []}, ["did you mean 'ignore"]),
        ({"targts": {"a": "int8"}}, ["did you mean 'targets'"]),
        ({"scheme": "fp8_per_chanel"}, ["did you mean 'fp8_per_channel'"]),
        ({"targets": {"a": "int44"}}, ["int44", "did you mean 'int4'"]),
        ({"components": {"vae": {"skeme": "int8"}}}, ["components.vae.skeme", "did you mean 'scheme'"]),
        ({"fallback": "none"}, ["fallback", "weight_only"]),
        ({"on_unmatched": "ignore"}, ["on_unmatched", "warn"]),
        ({"nonfinite": "nan"}, ["nonfinite", "zero"]),
        ({"activation_scheme": "static"}, ["activation_scheme", "static", "dynamic"]),
        ({"scheme": 8}, ["scheme", "8"]),
        ({"ignore": "lm_head"}, ["ignore", "lm_head"]),
        ({"ignore": [1]}, ["ignore.0"]),
        ({"targets": ["a"]}, ["targets"]),
        ({"components": 3}, ["components"]),
        (7, ["configuration"]),
        (["int8"], ["configuration"]),
    ],
)
def test_errors_name_the_key_and_what_would_work(value, named):
    refused(value, *named)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"scheme": "int8", "method": "int8"}, ["scheme"]),
        ({"linear": "int8", "linear_scheme_override": "int8"}, ["linear"]),
        ({"ignore": ["a"], "ignored_layers": ["b"]}, ["ignore"]),
        ({"ignore": ["a", "b"], "targets": {"b": "int8"}}, ["'b'", "ignore", "targets"]),
    ],
)
def test_conflicts(value, named):
    refused(value, *named)


@pytest.mark.parametrize("key", ["ignore", "targets"])
@pytest.mark.parametrize(
    "pattern",
    ["re:(", "re:[", "re:*a", "re:(?P<x>a)(?P<x>b)", "re:a{99999999999999999999}", f"re:{'(' * 9999}"],
)
def test_bad_regular_expressions(key, pattern):
    refused({key: [pattern] if key == "ignore" else {pattern: "int8"}}, pattern[:20])


def test_good_regular_expressions_are_matched_from_the_start():
    assert compile_pattern("re:model.layers.1").match("model.layers.11.q")
    assert not compile_pattern("re:layers").match("model.layers.1")
    assert not compile_pattern("model.layers.1").match("model.layers.11")
    assert compile_pattern("*.1?.q_proj").match("model.layers.11.q_proj")


def test_block_size():
    assert parse({"scheme": "fp8_per_block", "weight_block_size": [128, 128]}).weight_block_size == (128, 128)
    refused({"scheme": "fp8_per_block", "weight_block_size": [64, 64]}, "weight_block_size", "128")
    refused({"scheme": "fp8_per_block", "weight_block_size": [128]}, "weight_block_size")
    refused({"scheme": "int8", "weight_block_size": [128, 128]}, "weight_block_size", "int8")


def test_block_size_alone_is_not_dropped():
    """With no scheme the device would choose one without blocks: blocks mean fp8_per_block, or are
    refused.
    """
    try:
        assert parse({"weight_block_size": [128, 128]}).scheme == "fp8_per_block"
    except ConfigError as error:
        check_parts(error, "weight_block_size")


def test_group_size():
    for scheme in ("int4", "int4_weight_only", "w4a16"):
        assert parse({"scheme": scheme, "group_size": 32}).scheme == "int4_weight_only_g32"
        assert parse({"scheme": scheme, "group_size": 128}).scheme == "int4_weight_only"
    assert parse({"targets": {"a": "int4"}, "group_size": 32}).targets == {"a": "int4_weight_only_g32"}
    refused({"scheme": "int4", "group_size": 64}, "group_size")
    refused({"scheme": "int8", "group_size": 32}, "group_size", "int8")


@pytest.mark.parametrize("spelled", ["int4", "INT4", "int4:hadamard"])
def test_int4_is_the_least_lossy_of_its_kind_unless_a_size_or_activations_say_which(spelled):
    options = spelled[4:]
    assert parse({"scheme": spelled}).scheme == f"int4_mse{options}"
    assert parse({"moe": spelled, "group_size": 32}).moe == f"int4_weight_only_g32{options}"
    assert parse({"linear": {"weight": "int4"}}).linear == "int4_weight_only"
    assert parse({"linear": {"weight": "int4", "activation": "int8_per_token"}}).linear == "int4_w4a8"


def test_group_size_against_the_name_of_the_scheme():
    """int4_weight_only_g32 says 32: a group_size of 128 contradicts it."""
    refused({"scheme": "int4_weight_only_g32", "group_size": 128}, "group_size")


def test_group_size_alone_is_not_dropped():
    try:
        assert parse({"group_size": 32}).scheme == "int4_weight_only_g32"
    except ConfigError as error:
        check_parts(error, "group_size")


def test_a_parsed_config_parses_to_itself():
    config = parse({"scheme": "int4", "group_size": 32, "components": {"a": {"moe": None}, "b": None}})
    assert parse(config) == config
    assert parse(config.model_dump(exclude_unset=True)) == config


def test_schemes_refuse_a_taken_name():
    extra = Scheme("mine", Quant("int8", (1, 0)), None, "", aliases=("fp8",))
    with pytest.raises(ConfigError) as caught:
        Schemes((*BUILTIN.values(), extra))
    check_parts(caught.value, "'mine'", "'fp8'", "fp8_per_tensor")


def test_schemes_table():
    assert "w8a8" in BUILTIN
    assert 3 not in BUILTIN
    assert set(BUILTIN) == {s.name for s in BUILTIN.values()}
    assert len(BUILTIN) == len(list(BUILTIN))
    with pytest.raises(ConfigError, match="did you mean 'int8'"):
        BUILTIN["int_8"]


@pytest.mark.parametrize(
    ("value", "scheme", "code"),
    [
        ("int8", "int8", None),
        (None, "fp8_weight_only", None),
        ({"scheme": "int8", "linear": None}, None, SkipCode.NULL_SCHEME),
        ({"scheme": "int8", "linear": "none"}, None, SkipCode.NULL_SCHEME),
        ({"scheme": "int8", "moe": None}, "int8", None),
        ({"scheme": "int8", "ignore": ["*.b"]}, None, SkipCode.PATTERN),
        ({"scheme": "int8", "targets": {"*.b": "fp8"}}, "fp8_per_tensor", None),
        ({"scheme": "int8", "linear": "int4", "targets": {"*.b": None}}, None, SkipCode.PATTERN),
        ({"scheme": "int8", "num_bf16_fallback_layers": 1}, None, SkipCode.FIRST_BLOCKS),
        ({"scheme": "int8", "num_bf16_fallback_layers": 1, "linear": None}, None, SkipCode.FIRST_BLOCKS),
        ({"blocks": None}, None, SkipCode.NULL_COMPONENT),
    ],
)
def test_an_assignment_is_a_scheme_or_a_reason(value, scheme, code):
    layer = Layer("blocks.0.b", "linear", (("weight", 8, 8),), torch.bfloat16)
    (assignment,) = resolve([layer], parse(value), "fp8_weight_only")
    assert assignment.scheme == scheme
    assert (assignment.skip_reason and assignment.skip_reason.code) == code
    assert not assignment.skip_reason or assignment.skip_reason.configured


def test_reasons_are_told_in_words():
    layer = Layer("a.b", "linear", (("weight", 8, 8),), torch.bfloat16)
    told = {}
    for value in ({"linear": None}, {"ignore": ["a.*"]}, {"targets": {"re:a": None}}):
        (assignment,) = resolve([layer], parse({"scheme": "int8", **value}), None)
        told[next(iter(value))] = str(assignment.skip_reason)
    assert told == {
        "linear": "left alone by linear=null",
        "ignore": "left alone by pattern 'a.*'",
        "targets": "left alone by pattern 're:a'",
    }
