"""Patterns match in bounded time and compile in bounded memory."""

from __future__ import annotations

import re

import pytest
from core_fakes import tensors
from core_references import check_parts

from quantport.config import QuantConfig
from quantport.config.resolve import resolve
from quantport.errors import ConfigError
from quantport.model.layers import find_layers
from quantport.model.patterns import compile_pattern
from quantport.scheme.catalog import BUILTIN

LONG = "model." + "a" * 60 + "!"
EVIL = [r"re:model.(?:a|a)*$", r"re:(.|.)*[^\w.!]", r"re:(?:[a-z.]|.)*\d$", r"module:(.|.)*(?:\?|;)"]


@pytest.mark.parametrize("pattern", EVIL)
def test_a_match_without_end_is_refused_by_name(pattern):
    with pytest.raises(ConfigError) as caught:
        compile_pattern(pattern).match(LONG)
    check_parts(caught.value, repr(pattern), "takes too long", "glob")


def test_a_match_that_would_end_in_seconds_is_refused_too():
    with pytest.raises(ConfigError, match="takes too long"):
        compile_pattern("re:(?:x|x)*$").match("x" * 24 + "!")


@pytest.mark.parametrize("key", ["ignore", "targets", "modules_to_not_convert"])
def test_so_it_is_in_a_configuration(key):
    pattern = EVIL[1].removeprefix("re:") if key == "modules_to_not_convert" else EVIL[1]
    config = {key: {pattern: "int4"} if key == "targets" else [pattern]}
    layers = find_layers(tensors(**{f"{LONG}__weight": (8, 8)}))
    with pytest.raises(ConfigError, match="takes too long"):
        resolve(layers, QuantConfig.parse(config, BUILTIN), "int8")


def test_many_names_share_what_a_pattern_may_take():
    """Each of them takes less than its limit."""
    names = [f"{'x' * 14}!{i}" for i in range(2000)]
    layers = find_layers(tensors(**{f"{name}__weight": (8, 8) for name in names}))
    config = QuantConfig.parse({"ignore": ["re:(?:x|x)*$"], "on_unmatched": "warn"}, BUILTIN)
    assert not compile_pattern("re:(?:x|x)*$").match(names[0])
    with pytest.raises(ConfigError, match="takes too long"):
        resolve(layers, config, "int8")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("re:((a{1000}){1000}){1000}", "counted repeats"),
        ("re:(?:a{99999}){99999}", "counted repeats"),
        ("re:a{0,4000000000}", "counted repeats"),
        ("module:(a{1000}){1000}", "counted repeats"),
        ("re:" + "a" * 5000, "5,000 characters"),
        ("re:" + "(" * 400 + ")" * 400, "not a regular expression"),
    ],
)
def test_what_would_take_much_memory_to_compile_is_refused(pattern, found):
    with pytest.raises(ConfigError, match=found):
        compile_pattern(pattern)


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "model.layers.1",
            ".*q_proj",
            r".*\.(q|k|v)_proj$",
            r"^(?!.*(vision|audio)).*mlp",
            r".*layers\.\d{1,2}\.",
        ),
        *("(?i)MODEL", ".*lm_head", r"model\.layers\.(?:[02468])\.", "", "a{e}", r"[^.]+\.norm"),
    ],
)
def test_matches_as_pythons_own_engine(expression):
    names = (
        "model.layers.1.mlp.up_proj",
        "model.layers.12.self_attn.q_proj",
        "lm_head",
        "model.norm",
        "a{e}",
    )
    for name in (*names, "vision.mlp"):
        assert compile_pattern(f"re:{expression}").match(name) == bool(re.match(expression, name))


def test_a_glob_of_many_stars_is_quick():
    assert not compile_pattern("*a" * 400 + "b").match("a" * 900)
