"""Checkpoints of Quark, by hand, after amd-quark 0.13: ``realquantizer.py`` and ``pack.py`` for what is
stored; ``value = (code - zero point) * scale``.
"""

from __future__ import annotations

import json

import pytest
import torch
from format_checks import Made, converts, experts_of, keeps, overlays, quantizable, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_floats import mxfp4

import quantport
from quantport.checkpoint import Checkpoint
from quantport.errors import CheckpointError, QuantportError
from quantport.scheme.catalog import BUILTIN
from quantport_formats.quark import Quark

CHECKED_BY = "by hand, after amd-quark 0.13"
# notices, which tests of their own look at
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def spec(dtype, qscheme, dynamic=None, **more):
    """A ``QTensorConfig`` as it is written."""
    return {"dtype": dtype, "qscheme": qscheme, "is_dynamic": dynamic, "symmetric": True, **more}


MX = {"group_size": 32, "scale_format": "e8m0", "ch_axis": -1}
LAYERS = {
    "fp8": {
        "weight": spec("fp8_e4m3", "per_tensor"),
        "input_tensors": spec("fp8_e4m3", "per_tensor", False),
    },
    "fp8 per channel": {
        "weight": spec("fp8_e4m3", "per_channel", ch_axis=0),
        "input_tensors": spec("fp8_e4m3", "per_channel", True, ch_axis=1),
    },
    "fp8 alone": {"weight": spec("fp8_e4m3", "per_channel", ch_axis=0), "input_tensors": None},
    "int8": {
        "weight": spec("int8", "per_channel", ch_axis=0),
        "input_tensors": spec("int8", "per_channel", True, ch_axis=1),
    },
    "int8 static": {
        "weight": spec("int8", "per_channel", ch_axis=0),
        "input_tensors": spec("int8", "per_tensor", False) | {"symmetric": False},
    },
    "int8 asymmetric": {"weight": spec("int8", "per_tensor") | {"symmetric": False}, "input_tensors": None},
    "mxfp4": {
        "weight": spec("fp4", "per_group", False, **MX),
        "input_tensors": spec("fp4", "per_group", True, **MX),
    },
    "mxfp4 alone": {"weight": spec("fp4", "per_group", False, **MX), "input_tensors": None},
}
HELD = {
    "fp8": "fp8_per_tensor:static",
    "int8 static": "int8:static_asym",
    "fp8 per channel": "fp8_per_channel",
    "fp8 alone": "fp8_weight_only",
    "int8": "int8",
    "int8 asymmetric": "int8_weight_only:tensor:asym",
    "mxfp4": "mxfp4",
    "mxfp4 alone": "mxfp4_weight_only",
}


def stored_as(kind, weight):
    """What is stored for a weight, and what it stands for; scales are in BF16, as of the model."""
    weight = weight.float()
    if kind.startswith("mxfp4"):
        packed, exponents, values = mxfp4(weight)
        return {"weight": packed, "weight_scale": exponents}, values
    whole = "per_tensor" in str(LAYERS[kind]["weight"])
    amax = weight.abs().max() if whole else weight.abs().amax(1)
    scale = (amax / (127 if "int8" in kind else 448)).bfloat16()
    spread = scale.float() if whole else scale.float()[:, None]
    if kind.startswith("fp8"):
        codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale}, codes.float() * spread
    zero = torch.full(scale.shape, 3 if "asymmetric" in kind else 0, dtype=torch.int32)
    codes = ((weight / spread).round() + zero.view(-1, 1)).clamp(-128, 127).to(torch.int8)
    stored = {"weight": codes, "weight_scale": scale, "weight_zero_point": zero}
    return stored, (codes.int() - zero.view(-1, 1)).float() * spread


def made(choice, model="llama", patterns=()):
    """A checkpoint; ``choice`` is one kind, or one for each module, which the patterns then name."""
    config, tensors = tiny(model)
    values, schemes, inputs = {}, {}, {}
    for name in quantizable(tensors):
        module = name.removesuffix(".weight")
        kind = choice if isinstance(choice, str) else choice(module)
        stored, values[name] = stored_as(kind, tensors.pop(name))
        tensors |= {f"{module}.{key}": value for key, value in stored.items()}
        schemes[name] = HELD[kind]
        if "static" in HELD[kind]:
            zero = -11 if kind == "int8 static" else 0
            inputs[name] = 0.03125 * (1 + len(values) % 3), zero
            tensors[f"{module}.input_scale"] = torch.tensor(inputs[name][0])
            tensors[f"{module}.input_zero_point"] = torch.tensor(zero, dtype=torch.int32)
    described = {
        "quant_method": "quark",
        "global_quant_config": LAYERS[choice if isinstance(choice, str) else "fp8"],
        "layer_quant_config": {pattern: LAYERS[kind] for pattern, kind in patterns},
        "exclude": ["lm_head"],
        "export": {"pack_method": "reorder", "weight_format": "real_quantized"},
    }
    return Made({**config, "quantization_config": described}, tensors, values, schemes=schemes, inputs=inputs)


@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_kept_to_the_bit(kind, tmp_path):
    keeps(made(kind), tmp_path)


@pytest.mark.parametrize("kind", ["int8", "mxfp4"])
def test_experts_are_kept(kind, tmp_path):
    assert len(experts_of(keeps(made(kind, "qwen3_moe"), tmp_path))) == 1


def test_the_first_pattern_decides(tmp_path):
    patterns = [("*.down_proj", "mxfp4"), ("*mlp*", "int8")]

    def choice(module):
        return "mxfp4" if module.endswith("down_proj") else "int8" if "mlp" in module else "fp8"

    keeps(made(choice, patterns=patterns), tmp_path)


@pytest.mark.parametrize("kind", ["int8", "mxfp4 alone"])
def test_it_becomes_another_scheme(kind, tmp_path):
    converts(made(kind), tmp_path, "fp8_per_channel")


def test_what_was_left_is_quantized(tmp_path):
    overlays(made("mxfp4"), tmp_path, "lm_head")


def test_stray_scales_and_the_cache_are_named(tmp_path):
    checkpoint = made("fp8 alone")
    checkpoint.tensors["model.layers.0.mlp.up_proj.input_scale"] = torch.tensor(0.5)
    outputs = {"output_tensors": spec("fp8_e4m3", "per_tensor", False)}
    checkpoint.config["quantization_config"]["kv_cache_quant_config"] = {"*k_proj": outputs}
    plan = quantport.plan(checkpoint.write(tmp_path), device="cpu")
    said = "\n".join(plan.warnings)
    assert "1 stored scales of activations" in said
    assert plan.config.kv_cache_dtype == "fp8_e4m3"


DAMAGE = {
    "nothing": (lambda c: c.pop("global_quant_config"), "says nothing"),
    "dtype": (lambda c: c["global_quant_config"]["weight"].update(dtype="mx9"), "mx9"),
    "scheme": (lambda c: c["global_quant_config"]["weight"].update(qscheme="per_block"), "per_block"),
    "groups": (
        lambda c: c["global_quant_config"]["weight"].update(qscheme="per_group", group_size=16),
        "int8 per_group",
    ),
    "kind": (lambda c: c["global_quant_config"].update(weight=[1, 2]), "'None'"),
    "patterns": (lambda c: c.update(layer_quant_config={"*" * 2000: {}}), "patterns of layers"),
    "tensors": (lambda c: c["global_quant_config"].update(LAYERS["fp8"]), "float8_e4m3fn"),
}


@pytest.mark.parametrize(("damage", "found"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_wrong_is_refused(damage, found, tmp_path):
    checkpoint = made("int8")
    checkpoint.config = json.loads(json.dumps(checkpoint.config))
    damage(checkpoint.config["quantization_config"])
    with pytest.raises(CheckpointError) as caught:
        quantport.plan(checkpoint.write(tmp_path), device="cpu")
    assert "as quark" in caught.value.asked
    assert found in f"{caught.value.found} {caught.value.suggestion}"


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["int8", "per_group"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = ["global_quant_config", "layer_quant_config", "kv_cache_quant_config", "weight", "input_tensors"]
KEYS += ["dtype", "qscheme", "group_size", "symmetric", "is_dynamic", "scale_format", "output_tensors"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = made("int8").write(tmp_path_factory.mktemp("quark"))
    return Checkpoint.open(folder), (folder / "config.json").read_text(encoding="utf-8")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 3), key=st.sampled_from(KEYS), value=ANY)
def test_any_configuration_is_taken_or_refused(opened, place, key, value):
    source, text = opened
    config = json.loads(text)
    entry = config["quantization_config"]
    for step in ("global_quant_config", "weight")[:place]:
        entry = entry[step]
    entry[key] = value
    refused = False
    try:
        found = Quark().recognize(source, config, BUILTIN)
    except QuantportError:
        refused, found = True, None
    assert refused or found.quantized()
