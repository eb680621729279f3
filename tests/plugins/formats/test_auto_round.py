"""AutoRound checkpoints in each of its packings; that they are read as AutoRound does is checked with layers
that its modules packed and multiplied (0.16.1: ``qlinear_torch_zp.py`` and ``qlinear_torch.py`` of
``auto_round_extension/torch``; the values are the outputs for the unit matrix, in fp32, the first 16), in
``data/auto_round.safetensors``.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import test_awq
import test_gptq
from core_models import same_bits
from format_checks import Made, converts, keeps, overlays
from hypothesis import given, settings
from hypothesis import strategies as st
from junk import junk
from safetensors.torch import load_file, save_file

import quantport
from quantport.checkpoint import Checkpoint
from quantport.errors import CheckpointError
from quantport.scheme.catalog import BUILTIN
from quantport_formats.auto_round import AutoRound

CHECKED_BY = "AutoRound 0.16.1"

PACKED = Path(__file__).parent / "data" / "auto_round.safetensors"


def stored(packing: str, bits: int = 4, symmetric: bool = True, method: str = "auto-round") -> Made:
    if "awq" in packing:
        made = test_awq.stored("gemm", 64)
    else:
        made = test_gptq.stored(bits, 64, symmetric, "gptq" if "auto_gptq" in packing else "gptq_v2")
        made.tensors = {n: t for n, t in made.tensors.items() if not n.endswith(".g_idx")}
    said = {"bits": bits, "group_size": 64, "sym": symmetric, "data_type": "int"}
    made.config["quantization_config"] = {**said, "quant_method": method, "packing_format": packing}
    return made


CASES = {
    "symmetric": ("auto_round:auto_gptq", 4, True),
    "zero points": ("auto_round:auto_gptq", 4, False, "intel/auto-round"),
    "8 bits": ("auto_round:auto_gptq", 8, True, "inc"),
    "as they are": ("auto_round", 4, False),
    "gptqmodel": ("auto_round:gptqmodel", 8, False),
    "awq": ("auto_round:auto_awq", 4, False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_kept_to_the_bit(case, tmp_path):
    keeps(stored(*case), tmp_path)


def test_it_becomes_another_scheme(tmp_path):
    converts(stored("auto_round:auto_gptq"), tmp_path)


def test_what_was_left_is_quantized(tmp_path):
    overlays(stored("auto_round:auto_gptq"), tmp_path, "lm_head")


def test_layers_of_other_bits_and_without_symmetry(tmp_path):
    made, other = stored("auto_round", 4, False), stored("auto_round", 8, False)
    for tensors, source in ((made.tensors, other.tensors), (made.values, other.values)):
        tensors |= {name: source[name] for name in tensors if "down_proj" in name}
    made.schemes = {name: other.scheme for name in made.values if "down_proj" in name}
    extra = {"model.layers.0.mlp.down_proj": {"bits": 8, "sym": False}, "lm_head": {"bits": 16}}
    made.config["quantization_config"] |= {"sym": True, "extra_config": extra}
    keeps(made, tmp_path)


def test_the_configuration_in_a_file_of_its_own(tmp_path):
    made = stored("auto_round:auto_gptq")
    made.files["quantization_config.json"] = json.dumps(made.config.pop("quantization_config"))
    keeps(made, tmp_path)


def test_layers_that_autoround_packed(tmp_path):
    every = load_file(PACKED)
    cases = sorted({name.partition(".")[0] for name in every})
    assert cases == ["auto_gptq2", "auto_gptq3", "auto_gptq4", "auto_gptq8", "auto_round3", "auto_round4"]
    for case in cases:
        folder = tmp_path / case
        folder.mkdir()
        parts = {f"x_proj.{key}": every[f"{case}.{key}"] for key in ("qweight", "qzeros", "scales")}
        save_file(parts, folder / "model.safetensors")
        packing = {"auto_gptq": "auto_round:auto_gptq", "auto_round": "auto_round"}[case[:-1]]
        said = {"quant_method": "auto-round", "bits": int(case[-1]), "group_size": 32, "sym": False}
        with contextlib.closing(Checkpoint.open(folder)) as source:
            config = {"quantization_config": {**said, "packing_format": packing}}
            found = AutoRound().recognize(source, config, BUILTIN)
            assert found is not None
            values = found.source.read("x_proj.weight")
            assert same_bits(values[:16], every[f"{case}.values"]), case


@pytest.mark.parametrize(
    "said",
    [
        {"packing_format": "auto_round:llm_compressor"},
        {"packing_format": ["auto_round"]},
        {"act_bits": 8},
        {"bits": 3},
        {"group_size": "64"},
    ],
    ids=str,
)
def test_what_is_wrong_is_refused(said, tmp_path):
    made = stored("auto_round:auto_gptq")
    made.config["quantization_config"] |= said
    refused(made, tmp_path)


def test_codes_that_are_absent_are_named(tmp_path):
    made = stored("auto_round:auto_gptq")
    made.tensors = {n: t for n, t in made.tensors.items() if not n.endswith((".qweight", ".qzeros"))}
    refused(made, tmp_path)


def refused(made: Made, folder: Path) -> None:
    made.write(folder)
    for call in (quantport.plan, quantport.load):
        with pytest.raises(CheckpointError) as caught:
            call(folder, device="cpu")
        assert "auto-round" in caught.value.asked


keys = st.sampled_from(["bits", "group_size", "sym", "extra_config", "act_bits", "packing_format"])


@settings(max_examples=200, deadline=None)
@given(changes=st.dictionaries(keys, junk, max_size=3))
def test_any_configuration_is_read_or_refused(changes, two_layers):
    said = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", **changes}
    with contextlib.suppress(CheckpointError):
        found = AutoRound().recognize(two_layers, {"quantization_config": said}, BUILTIN)
        assert found is not None
        assert found.layers()


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    folder = stored("auto_round:auto_gptq").write(tmp_path_factory.mktemp("a"))
    with contextlib.closing(Checkpoint.open(folder)) as source:
        yield source
