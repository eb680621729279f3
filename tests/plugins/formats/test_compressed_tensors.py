"""Checkpoints of compressed-tensors: made and decoded by the library (0.20), kept to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_checkpoints import made, mixed, preset, static, with_targets
from core_models import DENSE, same_state
from format_checks import converts, experts_of, keeps, overlays, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import quantport
from quantport.checkpoint import Checkpoint
from quantport.errors import CheckpointError, QuantportError
from quantport.scheme.catalog import BUILTIN
from quantport_formats.compressed_tensors import CompressedTensors

CHECKED_BY = "compressed-tensors 0.20"
# notices, which tests of their own look at
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
INT8 = preset("W8A8")
FP8 = preset("FP8_DYNAMIC")
PACK, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
CASES = {
    "int8": (INT8, INT, "int8"),
    "int8 per tensor": (preset("W8A8", strategy="tensor"), INT, "int8:tensor"),
    "int8 asymmetric": (preset("W8A8", symmetric=False), INT, "int8:asym"),
    "int8 alone": (preset("W8A8", inputs=False), NAIVE, "int8_weight_only"),
    "int8 packed": (preset("W8A16", group=64), PACK, "int8_weight_only:g64"),
    "int8 packed asymmetric": (preset("W8A16", symmetric=False), PACK, "int8_weight_only:g128:asym"),
    "int4": (preset("W4A16"), PACK, "int4_weight_only"),
    "int4 g32": (preset("W4A16", group=32), PACK, "int4_weight_only:g32"),
    "int4 per channel": (
        preset("W4A16", strategy="channel", group_size=None),
        PACK,
        "int4_weight_only:channel",
    ),
    "int4 per tensor": (preset("W4A16", strategy="tensor", group_size=None), PACK, "int4_weight_only:tensor"),
    "int4 asymmetric": (preset("W4A16_ASYM"), PACK, "int4_weight_only:fp32:asym"),
    "int4 asymmetric g16": (preset("W4A16_ASYM", group=16), PACK, "int4_weight_only:g16:fp32:asym"),
    "int4 with int8": (preset("W4A8"), PACK, "int4_w4a8"),
    "int4 unpacked": (preset("W4A8"), INT, "int4_w4a8"),
    "int2": (preset("W2A16", group=32), PACK, "int4_weight_only:g32"),
    "int3": (preset("W3A16"), PACK, "int4_weight_only"),
    "int3 asymmetric": (preset("W3A16", symmetric=False), PACK, "int4_weight_only:fp32:asym"),
    "int6": (preset("W6A16"), PACK, "int8_weight_only:g128"),
    "fp8 per channel": (FP8, FLOAT, "fp8_per_channel"),
    "fp8 per tensor": (preset("FP8"), FLOAT, "fp8_per_tensor:static"),
    "fp8 static beside channels": (preset("FP8", strategy="channel"), FLOAT, "fp8_per_channel:static"),
    "int8 static": (static("W8A8"), INT, "int8:static"),
    "int8 static asymmetric": (static("W8A8", symmetric=False), INT, "int8:static_asym"),
    "int4 static": (static("W4A16", num_bits=8, type="int"), PACK, "int4_w4a8:static"),
    "fp8 blocks": (preset("FP8_BLOCK"), FLOAT, "fp8_per_block"),
    "fp8 other blocks": (preset("FP8_BLOCK", block_structure=[64, 32]), FLOAT, "fp8_per_channel:g32"),
    "fp8 alone": (preset("FP8_DYNAMIC", inputs=False), NAIVE, "fp8_weight_only"),
    "fp8 blocks alone": (preset("FP8_BLOCK", inputs=False), NAIVE, "fp8_weight_only:g128"),
    "mxfp8": (preset("MXFP8"), "mxfp8-quantized", "mxfp8"),
    "mxfp8 alone": (preset("MXFP8A16"), "mxfp8-quantized", "mxfp8_weight_only"),
    "mxfp6": (preset("MXFP6A8"), "mxfp6-pack-quantized", "mxfp8"),
    "mxfp6 alone": (preset("MXFP6A16"), "mxfp6-pack-quantized", "mxfp8_weight_only"),
    "mxfp4": (preset("MXFP4"), "mxfp4-pack-quantized", "mxfp4"),
    "mxfp4 alone": (preset("MXFP4A16"), "mxfp4-pack-quantized", "mxfp4_weight_only"),
    "nvfp4": (preset("NVFP4"), "nvfp4-pack-quantized", "nvfp4"),
    "nvfp4 alone": (preset("NVFP4A16"), "nvfp4-pack-quantized", "nvfp4_weight_only"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_kept_to_the_bit(case, tmp_path):
    keeps(made(*case), tmp_path)


@pytest.mark.parametrize(
    ("case", "dtype", "held"),
    [
        ("int4", torch.float16, "int4_weight_only:fp16"),
        ("int4", torch.float32, "int4_weight_only:fp32"),
        ("int8", torch.float16, "int8"),
        ("int4 asymmetric", torch.float16, "int4_weight_only:fp32:asym"),
        # zero points are taken off the codes, which then need one bit more
        ("int4 asymmetric", torch.float32, "int8_weight_only:g128"),
        ("int3 asymmetric", torch.float32, "int8_weight_only:g128"),
    ],
)
def test_scales_in_other_dtypes(case, dtype, held, tmp_path):
    scheme, kind, _ = CASES[case]
    keeps(made(scheme, kind, held, dtype=dtype), tmp_path)


def test_zero_points_of_eight_bits_beside_full_scales_are_near(tmp_path):
    """(code - zero) * scale has no exact twin there: a notice says how near it is."""
    scheme, kind, held = CASES["int8 packed asymmetric"]
    checkpoint = made(scheme, kind, held, dtype=torch.float32)
    with pytest.warns(UserWarning, match="within two roundings of fp32"):
        model = quantport.load(checkpoint.write(tmp_path), device="cpu")
    name = "model.layers.0.mlp.up_proj"
    module, value = model.get_submodule(name), checkpoint.values[f"{name}.weight"]
    own = quantport.numerics.dequantize_weight(module.stored_weight(""), BUILTIN[held], value.shape[1])
    assert not torch.equal(own, value)
    step = checkpoint.tensors[f"{name}.weight_scale"].max() * 256 * 2.0**-23
    assert (own - value).abs().max() <= step


@pytest.mark.parametrize(
    "case",
    ["int8", "int4", "int4 asymmetric", "fp8 per tensor", "int8 static asymmetric", "mxfp4", "nvfp4 alone"],
)
def test_experts_are_kept(case, tmp_path):
    scheme, kind, held = CASES[case]
    model = keeps(made(scheme, kind, held, model="qwen3_moe"), tmp_path)
    assert len(experts_of(model)) == 1


@pytest.mark.parametrize(
    "case", ["int8", "int4 asymmetric", "fp8 other blocks", "mxfp6 alone", "nvfp4 alone"]
)
def test_it_becomes_another_scheme(case, tmp_path):
    converts(made(*CASES[case]), tmp_path, "int8" if case != "int8" else "fp8_per_channel")


@pytest.mark.parametrize("case", ["int8", "int4", "mxfp4 alone"])
def test_what_was_left_is_quantized(case, tmp_path):
    overlays(made(*CASES[case]), tmp_path, "lm_head")


def mixture():
    """Attention in FP8, the down projection in INT8 and the others in INT4, and k_proj in 16 bits."""
    attention = with_targets(FP8, "re:.*self_attn.*")
    down = with_targets(INT8, "model.layers.0.mlp.down_proj")
    rest = with_targets(preset("W4A16", group=64), "Linear")

    def choice(module):
        if module.endswith("k_proj"):
            return None
        if module.endswith("down_proj"):
            return down, INT, "int8"
        if "self_attn" in module:
            return attention, FLOAT, "fp8_per_channel"
        return rest, PACK, "int4_weight_only:g64"

    return mixed(choice, "mixed-precision")


def test_each_group_has_its_own_scheme(tmp_path):
    model = keeps(mixture(), tmp_path)
    assert type(model.get_submodule("model.layers.0.self_attn.k_proj")) is torch.nn.Linear


def test_a_module_that_no_target_names_is_refused(tmp_path):
    checkpoint = mixture()
    groups = checkpoint.config["quantization_config"]["config_groups"]
    next(g for g in groups.values() if g["targets"] == ["Linear"])["targets"] = ["model.lost"]
    with pytest.raises(CheckpointError, match="none of 3 groups has it as a target"):
        quantport.plan(checkpoint.write(tmp_path), device="cpu")


def ordered(case):
    """A checkpoint in activation order, as llm-compressor wrote it: columns take any group."""
    checkpoint = made(*CASES[case])
    for name in list(checkpoint.values):
        module, (n, k) = name.removesuffix(".weight"), checkpoint.values[name].shape
        state = {key: checkpoint.tensors[f"{module}.{key}"] for key in ("weight_packed", "weight_scale")}
        groups = state["weight_scale"].shape[1]
        order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
        checkpoint.tensors[f"{module}.weight_g_idx"] = (torch.arange(k) // (k // groups))[order].int()
        # a column in its place is decoded by the library; then each goes where its group was
        in_place = checkpoint.values[name]
        codes = (in_place.view(n, groups, -1) / state["weight_scale"].float()[..., None]).round().view(n, k)
        scale = state["weight_scale"].float()[:, checkpoint.tensors[f"{module}.weight_g_idx"].long()]
        checkpoint.values[name] = codes * scale + 0.0  # codes have no negative zero
        checkpoint.schemes[name] = f"{CASES[case][2]}:actorder"
    return checkpoint


def test_activation_order_is_kept_and_said(tmp_path):
    checkpoint = ordered("int4 g32")
    keeps(checkpoint, tmp_path / "a")
    planned = {step.requested_scheme for step in quantport.plan(tmp_path / "a", device="cpu").quantized}
    assert planned == {"int4_weight_only:g32:actorder"}
    converts(checkpoint, tmp_path / "b")


def test_the_kv_cache_and_stray_scales_are_named(tmp_path):
    checkpoint = made(preset("FP8_DYNAMIC", strategy="tensor"), FLOAT, "fp8_per_tensor")
    for name in list(checkpoint.values):
        checkpoint.tensors[f"{name.removesuffix('.weight')}.input_scale"] = torch.tensor([0.1])
    for key in ("k_scale", "v_scale"):
        checkpoint.tensors[f"model.layers.0.self_attn.{key}"] = torch.tensor([0.5])
    described = checkpoint.config["quantization_config"]
    described["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    plan = quantport.plan(checkpoint.write(tmp_path), device="cpu")
    said = "\n".join(plan.warnings)
    assert "7 stored scales of activations" in said
    assert "2 stored scales of KV caches" in said
    assert plan.config.kv_cache_dtype == "fp8_e4m3"


DAMAGE = {
    "scale": ("int8", lambda t, c: t.pop(named(t, "weight_scale")), "no such tensor"),
    "zero": ("int4 asymmetric", lambda t, c: t.pop(named(t, "weight_zero_point")), "no such tensor"),
    "factor": ("nvfp4", lambda t, c: t.pop(named(t, "weight_global_scale")), "no such tensor"),
    "shape": ("int8", lambda t, c: put(t, "weight_scale", torch.ones(3, 1)), r"shape \[3, 1\]"),
    "dtype": ("mxfp4", lambda t, c: put(t, "weight_scale", torch.ones(128, 4)), "torch.float32"),
    "codes": (
        "int4",
        lambda t, c: put(t, "weight_packed", torch.ones(128, 9, dtype=torch.int32)),
        "rows of 9",
    ),
    "orphan": (
        "int8",
        lambda t, c: t.update({"lm_head.weight_scale": torch.ones(1)}),
        "belongs to no weight",
    ),
    "twice": (
        "int4",
        lambda t, c: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(256, 128)}),
        "up_proj.weight, which belongs to no",
    ),
    "zero beside": (
        "int8",
        lambda t, c: t.update({"model.layers.0.mlp.up_proj.weight_zero_point": torch.zeros(1)}),
        "beside symmetric",
    ),
    "format": ("int8", lambda t, c: c.update(format="int-quantized-2"), "one of int-quantized"),
    "marlin": ("int4", lambda t, c: c.update(format="marlin-24"), "marlin-24"),
    "sparse": ("int8", lambda t, c: c.update(sparsity_config={"format": "sparse-bitmask"}), "sparse"),
    "rotated": ("int8", lambda t, c: c.update(transform_config={"config_groups": {"R1": {}}}), "transform"),
    "groups": ("int8", lambda t, c: c.pop("config_groups"), "config_groups None"),
    "bits": ("int8", lambda t, c: weights(c).update(num_bits=12), "int12"),
    "kind": ("int8", lambda t, c: weights(c).update(type="complex"), "complex"),
    "size": ("int4", lambda t, c: weights(c).update(group_size=100), "words"),
    "strategy": (
        "int4",
        lambda t, c: weights(c).update(strategy="channel"),
        "strategy channel with group_size",
    ),
    "structure": ("fp8 blocks", lambda t, c: weights(c).update(block_structure="axb"), "strategy block with"),
    "expression": ("int8", lambda t, c: group_of(c).update(targets=["re:("]), "regular expression"),
    "asymmetric": ("fp8 per channel", lambda t, c: weights(c).update(symmetric=False), "asymmetric"),
    "blocks of int": (
        "int8",
        lambda t, c: weights(c).update(strategy="block", block_structure=[8, 8]),
        "int8 per block",
    ),
}


def named(tensors, key):
    return next(name for name in tensors if name.endswith(f".{key}"))


def put(tensors, key, tensor):
    tensors[named(tensors, key)] = tensor


def group_of(config):
    return config["config_groups"]["group_0"]


def weights(config):
    return group_of(config)["weights"]


@pytest.mark.parametrize(("case", "damage", "found"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_wrong_is_refused(case, damage, found, tmp_path):
    checkpoint = made(*CASES[case])
    damage(checkpoint.tensors, checkpoint.config["quantization_config"])
    with pytest.raises(CheckpointError, match=found) as caught:
        quantport.plan(checkpoint.write(tmp_path), device="cpu")
    assert "as compressed-tensors" in caught.value.asked
    assert caught.value.suggestion


def test_wrong_values_are_refused_when_they_are_read(tmp_path):
    wide = made(*CASES["int4 unpacked"])
    wide.tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = 100
    far = ordered("int4 g32")
    put(far.tensors, "weight_g_idx", torch.full((128,), 77, dtype=torch.int32))
    for checkpoint, found in ((wide, "codes from -8 to 100"), (far, "of other groups")):
        with pytest.raises(CheckpointError, match=found):
            quantport.load(checkpoint.write(tmp_path / found[-3:]), device="cpu")


def test_a_configuration_over_weights_in_16_bits_is_stale(tmp_path):
    config, tensors = tiny()
    checkpoint = made(*CASES["int8"])
    checkpoint.tensors, checkpoint.config = tensors, {**config, **checkpoint.config}
    with pytest.raises(CheckpointError, match="stale"):
        quantport.plan(checkpoint.write(tmp_path), device="cpu")


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["int", "float", "group", "block", "tensor_group", "Linear", "re:.*", "128x128"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
PLACES = [
    (),
    ("config_groups",),
    ("config_groups", "group_0"),
    ("config_groups", "group_0", "weights"),
    ("config_groups", "group_0", "input_activations"),
]
KEYS = ["format", "targets", "num_bits", "type", "strategy", "group_size", "block_structure", "symmetric"]
KEYS += ["dynamic", "scale_dtype", "kv_cache_scheme", "config_groups", "weights", "sparsity_config"]
KEYS += ["group_0", "transform_config", "ignore", "input_activations", "output_activations"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = made(*CASES["int4 asymmetric"]).write(tmp_path_factory.mktemp("ct"))
    return Checkpoint.open(folder), (folder / "config.json").read_text(encoding="utf-8")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), key=st.sampled_from(KEYS), value=ANY)
def test_any_configuration_is_taken_or_refused(opened, place, key, value):
    source, text = opened
    config = json.loads(text)
    entry = config["quantization_config"]
    for step in place:
        entry = entry[step]
    if entry is not None:
        entry[key] = value
    for answer in taken_or_refused(lambda: CompressedTensors().recognize(source, config, BUILTIN)):
        assert answer is None or answer.quantized()


def taken_or_refused(call):
    """What a call returns; nothing where it raises an error of three parts."""
    try:
        return [call()]
    except QuantportError as error:
        if not (error.asked and error.found and error.suggestion):
            raise AssertionError(error) from None
        return []


def test_what_a_configuration_asks_of_a_quantized_checkpoint_beside_nothing(tmp_path):
    kept = {"scheme": "int8", "ignore": ["*.down_proj"]}
    first = quantport.load(DENSE, config=kept)
    folder = quantport.save(first, tmp_path / "int8", format="compressed-tensors")
    for nothing in (
        {"model": None, "lm_head": None},
        {"model": {"ignore": ["*.down_proj"]}, "lm_head": None},
    ):
        same_state(quantport.load(folder, config=nothing), first)
    linear = quantport.load(folder, config={"linear": "int8_weight_only"})
    assert {step.scheme for step in linear.quantport_plan.quantized} == {"int8_weight_only"}
