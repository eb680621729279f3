"""Options of schemes (``mxfp4:floor``), and first blocks that stay in 16 bits."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import quantport
from quantport import numerics
from quantport.errors import ConfigError
from quantport.scheme.catalog import BUILTIN


def test_rules_change_weights_and_activations_alike():
    scheme = BUILTIN["mxfp4:floor"]
    assert (scheme.name, scheme.weight.rule, scheme.activation.rule) == ("mxfp4:floor", "floor", "floor")
    assert scheme.aliases == ()
    searched = BUILTIN["mxfp4:mse"]
    # activations are never searched for
    assert (searched.weight.rule, searched.activation.rule) == (
        "mse",
        "even",
    )


def test_an_alias_takes_options_and_they_add_up():
    assert BUILTIN["bnb_nf4:double:hadamard"].name == "nf4:double:hadamard"
    assert BUILTIN["nf4:double"].weight.scale_quant
    assert BUILTIN["int4:hadamard"].rotation == 128
    assert "mxfp4:floor" not in list(BUILTIN)


@pytest.mark.parametrize(
    ("asked", "suggestion"),
    [
        ("mxfp4:flor", "floor"),
        ("int8:floor", "no options"),
        ("mxfp4:even", "floor"),
        ("nf4:double:double", "hadamard"),
        ("mxfp9:floor", "mxfp"),
        ("q4_k:hadamard", "a8"),
        ("q4_k:a8:a8", "no options"),
        ("int8:a8", "no options"),
        ("int4_weight_only:a8", "hadamard"),
        ("mxfp4:", "floor"),
    ],
)
def test_a_wrong_option_is_told_what_works(asked, suggestion):
    with pytest.raises(ConfigError, match=suggestion):
        BUILTIN[asked]


@pytest.mark.parametrize(
    ("name", "precision", "activations"),
    [
        ("q4_0", "W4A8", "q8_0 per 1x32"),
        ("q5_1", "W5A8", "q8_0 per 1x32"),
        ("q8_0", "W8A8", "q8_0 per 1x32"),
        ("q2_k", "W2A8", "q8_k per 1x256"),
        ("q4_k", "W4A8", "q8_k per 1x256"),
        ("q5_k", "W5A8", "q8_k per 1x256"),
        ("q6_k", "W6A8", "q8_k per 1x256"),
    ],
)
def test_a8_changes_the_activations_and_no_stored_byte(name, precision, activations):
    scheme = BUILTIN[f"{name}:a8"]
    assert (scheme.precision, scheme.activations) == (precision, activations)
    assert (scheme.weight, scheme.weight_only.activation) == (BUILTIN[name].weight, None)
    layer = nn.Sequential(nn.Linear(300, 48)).bfloat16()
    quantport.quantize_(layer, scheme.name, fallback="reference")
    (told,) = json.loads(layer.quantport_plan.to_json())["layers"]
    assert (told["asked"], told["precision"], told["activations"]) == (scheme.name, precision, activations)


def test_a_rotated_layer_computes_what_its_weight_says():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(96, 48)).bfloat16()
    weight, x = layer[0].weight.detach().clone(), torch.randn(5, 96).bfloat16()
    scheme = BUILTIN["int4_weight_only_g32:hadamard"]
    bias = layer[0].bias.detach()
    quantport.quantize_(layer, scheme.name)
    stored = numerics.quantize_weight(weight, scheme)
    expected = numerics.linear(x, stored, scheme, bias).float()
    assert (layer(x).float() - expected).abs().max() <= 2**-6 * expected.abs().max()
    unrotated = torch.nn.functional.linear(
        x.float(), numerics.dequantize_weight(stored, scheme, 96), bias.float()
    )
    assert (expected - unrotated).abs().max() <= 2**-6 * expected.abs().max()


class Blocks(nn.Module):
    """A model with numbered blocks under a name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        setattr(
            self,
            name,
            nn.ModuleList(nn.ModuleDict({"a": nn.Linear(64, 64, dtype=torch.bfloat16)}) for _ in range(7)),
        )


@pytest.mark.parametrize(
    ("name", "count", "kept"), [("blocks", None, 5), ("layers", None, 0), ("layers", 2, 2), ("blocks", 0, 0)]
)
def test_first_blocks_stay(name, count, kept):
    config = {"scheme": "mxfp4_dualscale"} | ({} if count is None else {"num_bf16_fallback_layers": count})
    plan = quantport.plan(Blocks(name), config=config, device="cpu:generic")
    stayed = [s.layer.name for s in plan.steps if s.layer.kind == "linear" and s.requested_scheme is None]
    assert stayed == [f"{name}.{i}.a" for i in range(kept)]
    assert all("num_bf16_fallback_layers" in s.note for s in plan.steps if s.layer.name in stayed)


def test_other_schemes_keep_no_blocks_and_a_target_wins():
    assert len(quantport.plan(Blocks("blocks"), "mxfp4", device="cpu:generic").quantized) == 7
    config = {"scheme": "mxfp4_dualscale", "targets": {"blocks.0.a": "int8"}}
    assert (
        quantport.plan(Blocks("blocks"), config=config, device="cpu:generic")
        .by_layer["blocks.0.a"]
        .requested_scheme
        == "int8"
    )


def test_a_negative_number_of_blocks_is_refused():
    with pytest.raises(ConfigError, match="num_bf16_fallback_layers"):
        quantport.QuantConfig.parse({"scheme": "int8", "num_bf16_fallback_layers": -1}, BUILTIN)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"scheme": "int4_weight_only:hadamard", "group_size": 32}, "int4_weight_only_g32:hadamard"),
        ({"scheme": "int4_weight_only_g32:hadamard", "group_size": 32}, "int4_weight_only_g32:hadamard"),
        ({"scheme": "int8", "moe": "int4", "group_size": 32}, "int8"),
        ({"scheme": "int4_w4a8", "group_size": 128}, "int4_w4a8"),
    ],
)
def test_group_size_and_options(config, found):
    assert quantport.QuantConfig.parse(config, BUILTIN).scheme == found


@pytest.mark.parametrize(
    ("scheme", "size"), [("int4_mse", 32), ("int4_w4a8", 32), ("int4_hqq", 128), ("int4_g32:hadamard", 128)]
)
def test_a_group_size_that_the_scheme_does_not_have_is_refused(scheme, size):
    with pytest.raises(ConfigError, match="this scheme has groups of"):
        quantport.QuantConfig.parse({"scheme": scheme, "group_size": size}, BUILTIN)


def test_a_rotated_row_does_not_depend_on_its_neighbours():
    x = torch.randn(65, 384, generator=torch.Generator().manual_seed(0))
    whole = numerics.rotate(x, 128)
    assert all(torch.equal(numerics.rotate(x[i : i + 1], 128)[0], whole[i]) for i in (0, 13, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(numerics.rotate(x, 128), whole)
    assert torch.allclose(numerics.rotate(whole, 128), x, atol=1e-5)
    one = torch.zeros(1, 128)
    one[0, 3] = 1
    # Sylvester: (-1)**popcount(row & column)
    signs = torch.tensor([(-1.0) ** bin(3 & i).count("1") for i in range(128)])
    assert torch.equal(numerics.rotate(one, 128)[0], signs * (1 / 128**0.5))


def test_beside_components_it_would_mean_nothing():
    wrong = {"num_bf16_fallback_layers": 2}
    with pytest.raises(ConfigError, match="put it into each component"):
        quantport.QuantConfig.parse({"components": {"blocks": {"scheme": "int4"}}} | wrong, BUILTIN)
    inside = quantport.plan(
        Blocks("blocks"), config={"components": {"blocks": {"scheme": "int4"} | wrong}}, device="cpu:generic"
    )
    assert len(inside.quantized) == 5


def test_a_number_of_blocks_is_a_number():
    with pytest.raises(ConfigError, match="num_bf16_fallback_layers"):
        quantport.QuantConfig.parse({"scheme": "int8", "num_bf16_fallback_layers": True}, BUILTIN)
