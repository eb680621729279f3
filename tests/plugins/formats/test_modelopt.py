"""Checkpoints of ModelOpt, by hand, after ``torch/export/quant_utils.py`` of nvidia-modelopt 0.47 for what is
stored. The values of NVFP4, FP8 and MXFP8 here are those of its ``NVFP4QTensor``, ``FP8QTensor`` and
``MXFP8QTensor.dequantize`` in fp32, bit for bit: the library ran beside this file once.
"""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from core_models import same_bits
from format_checks import Made, converts, experts_of, held, keeps, overlays, quantizable, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_floats import codes_of, mxfp4, mxfp8

import quantport
from quantport.checkpoint import Checkpoint
from quantport.errors import CheckpointError, QuantportError
from quantport.scheme.catalog import BUILTIN
from quantport_formats.modelopt import ModelOpt

CHECKED_BY = "by hand; its values of NVFP4, FP8 and MXFP8 with nvidia-modelopt 0.47"
# notices, which tests of their own look at
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def nvfp4(weight):
    """Stored tensors, and ``e2m1 * (scale * scale_2)`` with each product in fp32."""
    factor = weight.abs().max().float() / (6 * 448)
    blocks = weight.float().unflatten(1, (-1, 16))
    scale = (blocks.abs().amax(2) / (6 * factor)).clamp_min(2.0**-9).to(torch.float8_e4m3fn)
    each = scale.float() * factor
    steps = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    scaled = blocks / each[..., None]
    codes = torch.bucketize(scaled.abs(), steps).to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
    codes = codes.flatten(1)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    stored = {"weight": packed, "weight_scale": scale, "weight_scale_2": factor, "input_scale": factor}
    return stored, codes_of(packed) * each.repeat_interleave(16, 1)


def floats(weight, rows, columns):
    """FP8 with scales of blocks."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -k % columns, 0, -n % rows))
    scale = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).abs().amax((1, 3)) / 448
    spread = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:n, :k]
    codes = (weight.float() / spread).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * spread


def stored_as(algorithm, weight):
    """What is stored for a weight, and what it stands for."""
    n, k = weight.shape
    if algorithm in ("NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8"):
        return nvfp4(weight)
    if algorithm == "MXFP8":
        codes, scale, values = mxfp8(weight)
    elif algorithm == "W4A8_MXFP4_FP8":
        codes, scale, values = mxfp4(weight)
    elif algorithm.startswith("W8A"):
        scale = weight.float().abs().amax(1) / 127
        codes = (weight / scale[:, None]).round().to(torch.int8)
        values = codes.float() * scale[:, None]
    else:
        sizes = {"FP8": (n, k), "FP8_PER_CHANNEL_PER_TOKEN": (1, k), "FP8_PB_WO": (128, 128)}[algorithm]
        codes, scale, values = floats(weight, *sizes)
        shape = {"FP8": (), "FP8_PER_CHANNEL_PER_TOKEN": (n,)}.get(
            algorithm, (-(-n // 128), 1, -(-k // 128), 1)
        )
        scale = scale.view(shape)
    stored = {"weight": codes, "weight_scale": scale}
    if algorithm in ("FP8", "W8A8_SQ_PER_CHANNEL"):
        stored["input_scale"] = scale.flatten()[0] * 3
    return stored, values


HELD = {
    "FP8": "fp8_per_tensor:static",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_per_channel",
    "FP8_PB_WO": "fp8_weight_only:g128",
    "MXFP8": "mxfp8",
    "NVFP4": "nvfp4",
    "W4A16_NVFP4": "nvfp4_weight_only",
    "W4A8_NVFP4_FP8": "nvfp4_weight_only",
    "W4A8_MXFP4_FP8": "mxfp4_weight_only",
    "W8A16": "int8_weight_only",
    "W8A8_SQ_PER_CHANNEL": "int8:static",
}
EXACT = [algorithm for algorithm in HELD if "NVFP4" not in algorithm]


def made(choice, model="llama", beside=False):
    """A checkpoint; ``choice`` is one algorithm, or one for each module."""
    config, tensors = tiny(model)
    values, schemes, layers, inputs = {}, {}, {}, {}
    for name in quantizable(tensors):
        module = name.removesuffix(".weight")
        algorithm = choice if isinstance(choice, str) else choice(module)
        stored, values[name] = stored_as(algorithm, tensors.pop(name))
        tensors |= {f"{module}.{key}": value.clone() for key, value in stored.items()}
        schemes[name] = HELD[algorithm]
        if "static" in HELD[algorithm]:
            inputs[name] = stored["input_scale"].item(), 0
        layers[module] = {"quant_algo": algorithm, "group_size": 16}
    described = {"quant_algo": choice, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head", "*.norm*"]}
    if not isinstance(choice, str):
        described |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    producer = {"name": "modelopt", "version": "0.47.0"}
    if beside:
        text = json.dumps({"producer": producer, "quantization": described})
        return Made(
            config, tensors, values, schemes=schemes, inputs=inputs, files={"hf_quant_config.json": text}
        )
    described = {"quant_method": "modelopt", "producer": producer, **described}
    return Made({**config, "quantization_config": described}, tensors, values, schemes=schemes, inputs=inputs)


@pytest.mark.parametrize("algorithm", EXACT)
def test_it_is_kept_to_the_bit(algorithm, tmp_path):
    keeps(made(algorithm), tmp_path)


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8"])
def test_nvfp4_is_kept_within_two_units_in_the_last_place(algorithm, tmp_path):
    """The codes and scales are taken over; the reciprocal of the factor is a rounding more."""
    checkpoint = made(algorithm)
    model = quantport.load(checkpoint.write(tmp_path), device="cpu")
    found = held(model)
    assert set(found) == set(checkpoint.values)
    for name, (scheme, values) in found.items():
        assert scheme == HELD[algorithm]
        assert (values - checkpoint.values[name]).abs().le(checkpoint.values[name].abs() * 2.0**-22).all()
        stored = model.get_submodule(name.removesuffix(".weight")).stored_weight("")
        module = name.removesuffix(".weight")
        assert torch.equal(stored["weight_packed"], checkpoint.tensors[f"{module}.weight"])


def test_the_configuration_may_stand_beside(tmp_path):
    keeps(made("FP8", beside=True), tmp_path / "a")
    other = made("FP8", beside=True)
    other.files["hf_quant_config.json"] = '{"producer": {"name": "somebody"}}'
    with pytest.raises(CheckpointError, match="quantized already"):
        quantport.plan(other.write(tmp_path / "b"), device="cpu")


@pytest.mark.parametrize("algorithm", ["FP8", "W8A8_SQ_PER_CHANNEL"])
def test_experts_are_kept(algorithm, tmp_path):
    assert len(experts_of(keeps(made(algorithm, "qwen3_moe"), tmp_path))) == 1


def by_kind(module):
    return "FP8" if "self_attn" in module else "MXFP8" if "down" in module else "W8A16"


def test_layers_of_their_own_are_kept(tmp_path):
    keeps(made(by_kind), tmp_path)


def test_a_layer_takes_what_is_said_of_its_parent(tmp_path):
    checkpoint = made(by_kind)
    layers = checkpoint.config["quantization_config"]["quantized_layers"]
    for module in list(layers):
        if "self_attn" in module:
            layers["model.layers.0.self_attn"] = layers.pop(module)
    keeps(checkpoint, tmp_path)


@pytest.mark.parametrize("algorithm", ["NVFP4", "FP8_PB_WO"])
def test_it_becomes_another_scheme(algorithm, tmp_path):
    converts(made(algorithm), tmp_path)


def test_nvfp4_decodes_to_the_bit_and_a_power_of_two_is_kept_to_the_bit(tmp_path):
    checkpoint = made("NVFP4")
    with contextlib.closing(Checkpoint.open(checkpoint.write(tmp_path / "a"))) as source:
        found = ModelOpt().recognize(source, checkpoint.config, BUILTIN)
        for name, values in checkpoint.values.items():
            assert same_bits(found.source.read(name), values)
            assert same_bits(found.source.read(name, slice(3, 21)), values[3:21])
    for name in checkpoint.values:
        factor = checkpoint.tensors[f"{name}_scale_2"]
        power = torch.exp2(factor.log2().round())
        # e2m1 * scale is exact in fp32, so that the values are those of the factor one, times the power
        exact = codes_of(checkpoint.tensors[name])
        exact = exact * checkpoint.tensors[f"{name}_scale"].float().repeat_interleave(16, 1)
        checkpoint.tensors[f"{name}_scale_2"] = power
        checkpoint.values[name] = exact * power
    keeps(checkpoint, tmp_path / "b")


def test_what_was_left_is_quantized(tmp_path):
    overlays(made("FP8"), tmp_path, "lm_head")


def test_a_kv_cache_that_is_not_known_is_named(tmp_path):
    checkpoint = made("FP8")
    checkpoint.config["quantization_config"]["kv_cache_quant_algo"] = "FP8_AFFINE"
    planned = quantport.plan(checkpoint.write(tmp_path), device="cpu")
    assert "the KV cache stays in 16 bits: FP8_AFFINE is not known here" in planned.warnings
    assert planned.config.kv_cache_dtype is None


@pytest.mark.parametrize("spelling", ["kv_cache_quant_algo", "kv_cache_scheme"])
def test_static_scales_and_the_cache_are_named(spelling, tmp_path):
    checkpoint = made("NVFP4")
    checkpoint.tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(0.5)
    asked = {"kv_cache_quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    checkpoint.config["quantization_config"][spelling] = asked[spelling]
    plan = quantport.plan(checkpoint.write(tmp_path), device="cpu")
    said = "\n".join(plan.warnings)
    assert "7 stored scales of activations" in said
    assert "1 stored scales of KV caches" in said
    assert "within 2 units in the last place" in said
    assert plan.config.kv_cache_dtype == "fp8_e4m3"


DAMAGE = {
    "absent": ("NVFP4", lambda t, c: t.pop("model.layers.0.mlp.up_proj.weight_scale_2"), "no such tensor"),
    "smoothed": ("FP8", lambda t, c: t.update({"a.pre_quant_scale": torch.ones(2)}), "pre_quant_scale"),
    "algorithm": ("FP8", lambda t, c: c.update(quant_algo="NVFP4_SVD"), "NVFP4_SVD"),
    "kind": ("FP8", lambda t, c: c.update(quant_algo=["FP8"]), "one of FP8"),
    "contradiction": ("FP8", lambda t, c: c.update(quant_algo="NVFP4"), "a matrix of torch.uint8"),
    "mixed": ("FP8", lambda t, c: c.update(quant_algo="MIXED_PRECISION"), "quant_algo 'None'"),
}


@pytest.mark.parametrize(("algorithm", "damage", "found"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_wrong_is_refused(algorithm, damage, found, tmp_path):
    checkpoint = made(algorithm)
    damage(checkpoint.tensors, checkpoint.config["quantization_config"])
    with pytest.raises(CheckpointError) as caught:
        quantport.plan(checkpoint.write(tmp_path), device="cpu")
    assert "as modelopt" in caught.value.asked
    assert found in f"{caught.value.found} {caught.value.suggestion}"


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["FP8", "MIXED_PRECISION"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = [
    "quant_algo",
    "quantized_layers",
    "quantization",
    "kv_cache_quant_algo",
    "kv_cache_scheme",
    "producer",
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = made("FP8").write(tmp_path_factory.mktemp("modelopt"))
    return Checkpoint.open(folder), (folder / "config.json").read_text(encoding="utf-8")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS), ANY, min_size=1))
def test_any_configuration_is_taken_or_refused(opened, changes):
    source, text = opened
    config = json.loads(text)
    config["quantization_config"] |= changes
    refused = False
    try:
        found = ModelOpt().recognize(source, config, BUILTIN)
    except QuantportError:
        refused, found = True, None
    assert refused or found.quantized()
