"""Configurations per component, and a fuzzer of the whole schema."""

from __future__ import annotations

import warnings

import pytest
import torch
from core_references import check_parts
from hypothesis import given, settings
from hypothesis import strategies as st

from quantport.config import QuantConfig
from quantport.config.resolve import resolve
from quantport.config.vllm_keys import OTHER_KEYS
from quantport.errors import ConfigError
from quantport.model.layers import Layer
from quantport.scheme.catalog import BUILTIN


def parse(value):
    return QuantConfig.parse(value, BUILTIN)


def linear(name):
    return Layer(name, "linear", (("weight", 64, 64),), torch.bfloat16)


def assigned(config, *names, default=None):
    """Scheme and reason of each of these linear layers."""
    found = resolve([linear(name) for name in names], config, default)
    return [(a.scheme, str(a.skip_reason or "")) for a in found]


def schemes(config, *names):
    return [scheme for scheme, _ in assigned(config, *names)]


def test_component_map_of_vllm_omni():
    config = parse(
        {
            "transformer": {"method": "fp8"},
            "vae": None,
            "transformer_2": {"scheme": "int8", "ignore": ["*.skip"]},
        }
    )
    assert assigned(config, "transformer.a", "transformer_2.a", "transformer_2.skip", "vae.conv") == [
        ("fp8_per_tensor", ""),
        ("int8", ""),
        (None, "left alone by pattern '*.skip'"),
        (None, "component 'vae' is mapped to null"),
    ]
    assert config.patterns() == ("*.skip",)


def test_a_map_may_name_schemes_alone_beside_a_null_or_a_configuration():
    config = parse({"thinker": "fp8", "talker": "int8", "code2wav": None})
    assert schemes(config, "thinker.a", "talker.a", "code2wav.a") == ["fp8_per_tensor", "int8", None]
    assert schemes(parse({"a": {"method": "fp8"}, "b": "int8"}), "a.x", "b.x") == ["fp8_per_tensor", "int8"]
    with pytest.raises(ConfigError, match="scheme"):
        parse({"schem": "int8"})
    with pytest.raises(ConfigError, match="int99"):
        parse({"a": "int99", "b": None})


@pytest.mark.parametrize(
    "config",
    [
        {"model": None, "lm_head": None, "schem": "int8"},
        {"model": "int8", "lm_head": None, "ignor": None},
        {"Model": "int8", "model": None, "lm_head": None},
        {"components": {"model": {"components": {"model.layer": "int8", "model": None}}, "lm_head": None}},
    ],
)
def test_a_component_that_holds_no_layer_is_no_silent_no_op(config):
    wrong = next(name for name in ("schem", "ignor", "Model", "model.layer") if repr(name) in repr(config))
    with pytest.raises(ConfigError) as caught:
        assigned(parse(config), "model.a", "lm_head")
    check_parts(caught.value, f"component {wrong!r}", "none of 2 layers", "model")
    spread = {} if "components" in config else {"components": config}
    with pytest.warns(UserWarning, match=f"component {wrong!r}"):
        assigned(parse({**(spread or config), "on_unmatched": "warn"}), "model.a", "lm_head")


def test_dot_boundary():
    """transformer must not catch transformer_2, as plain startswith does in vLLM-Omni."""
    config = parse({"transformer": {"method": "fp8"}})
    with pytest.raises(ConfigError) as caught:
        assigned(config, "transformer.a", "transformer_2.a")
    check_parts(caught.value, "transformer_2.a", "'transformer_2'", "null")


def test_longest_prefix_wins():
    config = parse({"components": {"a": "int8", "a.b": "fp8", "a.b.c": None}})
    assert schemes(config, "a.x", "a.b.x", "a.b.c.x", "a.bc") == ["int8", "fp8_per_tensor", None, "int8"]


def test_a_component_without_a_scheme_takes_the_default():
    """The one of the whole configuration, else the one that the device chooses: never a silent no-op."""
    config = parse({"scheme": "int8", "components": {"a": {"ignore": ["a.skip"]}, "b": "fp8"}})
    assert schemes(config, "a.x", "a.skip", "b.x") == ["int8", None, "fp8_per_tensor"]
    config = parse({"components": {"a": {"ignore": ["a.skip"]}}})
    assert assigned(config, "a.x", "a.skip", default="int8")[0] == ("int8", "")


@pytest.mark.parametrize("key", ["ignore", "targets", "linear"])
def test_keys_beside_components_act_or_are_refused(key):
    """What stands beside components must not be dropped silently."""
    value = {"ignore": ["a.x"], "targets": {"a.x": None}, "linear": None}[key]
    try:
        config = parse({key: value, "components": {"a": "int8"}})
    except ConfigError as error:
        check_parts(error, key)
        return
    assert schemes(config, "a.x") == [None]


def test_a_component_that_says_nothing_is_named():
    with pytest.raises(ConfigError, match="unknown_key"):
        parse({"transformer": {"unknown_key": 1}})


def test_nested_components_split_experts_too():
    weights = (("gate_proj", 8, 8), ("up_proj", 8, 8), ("down_proj", 8, 8))
    experts = Layer("a.b.experts", "moe", weights, torch.bfloat16, 2)
    inner = {"scheme": "int8", "ignore": ["*.experts.1"]}
    config = parse({"components": {"a": {"components": {"a.b": inner}}}})
    found = {a.layer.name: a.scheme for a in resolve([experts], config, None)}
    assert found == {"a.b.experts": "int8", "a.b.experts.1": None}


def test_nested_components_are_checked_too():
    with pytest.raises(ConfigError, match="int99"):
        parse({"components": {"a": {"components": {"a.b": {"scheme": "int99"}}}}})


KEYS = [*QuantConfig.model_fields, *OTHER_KEYS, "transformer", "x"]
TEXTS = ["int8", "fp8", "none", "re:(", "re:a.*", "*", "a.b", "128", "error", "dynamic"]
words = st.one_of(st.text(max_size=8), st.sampled_from([*TEXTS, *KEYS]))
atoms = st.one_of(st.none(), st.booleans(), st.integers(), st.sampled_from([32, 128]), st.floats(), words)
values = st.recursive(
    atoms,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=4)),
    max_leaves=12,
)
plausible = st.fixed_dictionaries(
    {},
    optional={
        "scheme": words,
        "linear": values,
        "moe": values,
        "ignore": st.lists(words, max_size=3),
        "targets": st.dictionaries(words, st.one_of(st.none(), words), max_size=3),
        "components": st.dictionaries(words, values, max_size=3),
        "group_size": st.sampled_from([32, 64, 128, None]),
        "weight_block_size": st.sampled_from([None, [128, 128], [1, 2], "ab"]),
        "fallback": words,
    },
)


@settings(max_examples=400, deadline=None)
@given(st.one_of(values, plausible, st.dictionaries(st.one_of(atoms, words), values, max_size=4)))
def test_fuzz(value):
    """Whatever comes in: a configuration, or an error in three parts. What was read reads back as itself."""
    try:
        config = parse(value)
    except ConfigError as error:
        check_parts(error)
        return
    assert isinstance(config, QuantConfig)
    assert parse(config.model_dump(exclude_unset=True)) == config
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of patterns that match nothing
            unmatched = config.model_copy(update={"on_unmatched": "warn"})
            ((scheme, why),) = assigned(unmatched, "a.b", default="int8")
    except ConfigError as error:
        check_parts(error)
    else:
        assert (scheme in BUILTIN) or (scheme is None and why)
