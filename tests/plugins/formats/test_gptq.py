"""GPTQ checkpoints of both versions, made by hand; that the formulas are the library's is checked with layers
that GPTQModel 7.7 packed (``TorchLinear``), saved as either version and dequantized with scales in fp32, the
first 16 rows: ``data/gptq.safetensors``.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from core_models import same_bits
from format_checks import Made, converts, held, is_made_of, keeps, overlays, quantizable, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from junk import junk
from packed_words import quantized, words
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantport
from quantport.checkpoint import Checkpoint
from quantport.errors import CheckpointError, SaveError
from quantport.scheme.catalog import BUILTIN
from quantport_cpu.jit import why_unavailable
from quantport_formats.gptq import Gptq

CHECKED_BY = "GPTQModel 7.7"

PACKED = Path(__file__).parent / "data" / "gptq.safetensors"


def stored(bits: int, group: int, symmetric: bool, version: str = "gptq", **more: Any) -> Made:
    """A Llama or, with ``kind``, another model; ``order`` groups inputs at random."""
    config, tensors = tiny(more.pop("kind", "llama"))
    order, dtype = more.pop("order", False), more.pop("dtype", torch.float16)
    values, k = {}, 0
    for name in quantizable(tensors):
        weight, stem = tensors.pop(name), name.removesuffix(".weight")
        k = weight.shape[1]
        some = torch.randperm(k) if order else None
        codes, zeros, scales, of, value = quantized(weight, bits, group, symmetric, some)
        if dtype is not torch.float16:
            scales = scales.to(dtype)
            value = (codes - zeros[:, of]).float() * scales.float()[:, of]
        tensors |= {
            f"{stem}.qweight": words(codes.t(), bits),
            f"{stem}.qzeros": zero_words(zeros, bits, version),
            f"{stem}.scales": scales.t(),
            f"{stem}.g_idx": of.to(torch.int32),
        }
        values[f"{stem}.weight"] = value
    said = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order, "sym": symmetric}
    said |= {"checkpoint_format": version, **more}
    scale = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    block = "channel" if group == -1 else f"g{group}"
    base = "int8_weight_only" if bits == 8 else "int4_weight_only"
    scheme = f"{base}:{block}:{scale}" if symmetric else f"{base}:{block}:fp32:asym"
    scheme += ":actorder" * order
    schemes = {}
    for name, value in values.items():  # a group of all inputs is a row
        if value.shape[1] == group:
            schemes[name] = scheme.replace(block, "channel")
    return Made({**config, "quantization_config": said}, tensors, values, scheme, schemes)


def zero_words(zeros: Tensor, bits: int, version: str) -> Tensor:
    """Zero points ``[n, groups]`` as they are stored; the first version subtracts one as GPTQModel does."""
    if version == "gptq" and bits == 3:
        return words(zeros - 1 & 7, bits).t()
    ones = sum(1 << place for place in range(0, 32, bits)) if version == "gptq" else 0
    return words(zeros, bits).t() - ones


def small_codes(bits: int) -> Any:
    """Codes below 4 bits are held in wider ones, which is said."""
    if bits >= 4:
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match=f"7 weights of {bits} bits are held in codes of 4 bits")


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_is_kept_to_the_bit(bits, version, symmetric, tmp_path):
    with small_codes(bits):
        keeps(stored(bits, 64, symmetric, version), tmp_path)


@pytest.mark.parametrize("case", [(4, -1, True), (4, -1, False), (8, 128, True), (4, 32, False)])
def test_groups_of_other_sizes(case, tmp_path):
    keeps(stored(*case), tmp_path)


def test_experts(tmp_path):
    keeps(stored(4, 32, True, kind="qwen3_moe"), tmp_path)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, False)])
def test_scales_in_bf16(bits, symmetric, tmp_path):
    keeps(stored(bits, 32, symmetric, dtype=torch.bfloat16), tmp_path)


def test_scales_in_fp32_with_zero_points_make_codes_of_8_bits(tmp_path):
    made = stored(4, 32, False, dtype=torch.float32)
    made.scheme = "int8_weight_only:g32:fp32"
    keeps(made, tmp_path)


@pytest.mark.parametrize("case", [(4, 64, True), (3, 64, False)])
def test_it_becomes_another_scheme(case, tmp_path):
    with small_codes(case[0]):
        converts(stored(*case), tmp_path)


def test_what_was_left_is_quantized(tmp_path):
    overlays(stored(4, 64, True), tmp_path, "lm_head")


@pytest.mark.parametrize("case", [(4, 64, False), (4, 32, True), (8, 64, True), (3, 64, False)])
def test_inputs_out_of_order_are_kept_in_the_order_of_their_groups(case, tmp_path):
    with small_codes(case[0]):
        made = stored(*case, order=True)
        model = keeps(made, tmp_path)
        stored_again, x = tmp_path / "again", torch.randint(0, 512, (1, 9))
        quantport.save(model, stored_again)
        again = quantport.load(stored_again, device="cpu")
        with torch.no_grad():
            assert torch.equal(model(x).logits, again(x).logits)
        is_made_of(made, quantport.load(tmp_path, "int8", device="cpu"), "int8")
        with pytest.raises(SaveError, match="in activation order"):
            quantport.save(model, tmp_path / "other", format="compressed-tensors")


@pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable() or "numba is installed")
@pytest.mark.parametrize("case", [(4, 64, True), (4, 64, False), (4, -1, True), (4, 32, True, "gptq_v2")])
@pytest.mark.parametrize("order", [False, True])
def test_a_kernel_multiplies_what_is_kept(case, order, tmp_path):
    planned = quantport.plan(stored(*case, order=order).write(tmp_path), device="cpu")
    chosen = {(step.choice.kernel, str(step.choice.status)) for step in planned.quantized}
    assert chosen == {("cpu.int4", "native")}


def test_experts_out_of_order_are_decoded_by_name(tmp_path):
    made = stored(4, 64, True, kind="qwen3_moe", order=True)
    planned = quantport.plan(made.write(tmp_path), device="cpu")
    assert {step.layer.kind for step in planned.quantized} == {"linear"}
    with pytest.warns(UserWarning, match=r"experts of 1 layers \(.*mlp.experts, ...\) are decoded"):
        model = quantport.load(tmp_path, device="cpu")
    for name, (_, values) in held(model).items():
        assert same_bits(values, made.values[name])
    down = model.get_submodule("model.layers.0.mlp.experts").down_proj[2]
    assert same_bits(down.detach(), made.values["model.layers.0.mlp.experts.2.down_proj.weight"].bfloat16())


def test_desc_act_with_one_group_changes_nothing(tmp_path):
    made = stored(4, -1, True)
    made.config["quantization_config"]["desc_act"] = True
    keeps(made, tmp_path)


def test_the_configuration_in_a_file_of_its_own(tmp_path):
    made = stored(4, 64, True)
    made.files["quantize_config.json"] = json.dumps(made.config.pop("quantization_config"))
    keeps(made, tmp_path)


def test_layers_of_other_bits(tmp_path):
    made, other = stored(4, 64, True), stored(8, 32, True)
    said = made.config["quantization_config"]
    said["dynamic"] = {r"+:.*down_proj": {"bits": 8, "group_size": 32}}
    for tensors in (made.tensors, made.values):
        source = other.tensors if tensors is made.tensors else other.values
        tensors |= {name: source[name] for name in tensors if "down_proj" in name}
    made.schemes = {name: other.scheme for name in made.values if "down_proj" in name}
    keeps(made, tmp_path)


def test_layers_that_gptqmodel_packed(tmp_path):
    every = load_file(PACKED)
    cases = sorted({name.partition(".")[0] for name in every})
    assert len(cases) == 8
    for case in cases:
        bits, version = int(case[1]), "gptq_v2" if "v2" in case else "gptq"
        folder = tmp_path / case
        folder.mkdir()
        parts = {f"x_proj.{key}": every[f"{case}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
        save_file(parts, folder / "model.safetensors")
        said = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": version}
        said |= {"sym": "asym" not in case, "desc_act": "order" in case}
        with contextlib.closing(Checkpoint.open(folder)) as source:
            found = Gptq().recognize(source, {"quantization_config": said}, BUILTIN)
            assert found is not None
            values = found.source.read("x_proj.weight")
            assert same_bits(values[:16], every[f"{case}.values"]), case
            some = found.source.read("x_proj.weight", slice(3, 10))
            assert same_bits(some, every[f"{case}.values"][3:10]), case


DAMAGE = {
    "no scales": ("scales", None),
    "no zeros": ("qzeros", None),
    "no codes": ("qweight", None),
    "scales of another shape": ("scales", torch.ones(3, 3)),
    "codes of another dtype": ("qweight", torch.ones(16, 128, dtype=torch.int64)),
    "order of another length": ("g_idx", torch.zeros(5, dtype=torch.int32)),
    "scales that are integers": ("scales", torch.ones(2, 128, dtype=torch.int32)),
    "groups of no size": ("scales", torch.ones(3, 128)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tensors_are_refused(damage, tmp_path):
    made, (part, tensor) = stored(4, 64, True), DAMAGE[damage]
    name = next(n for n in made.tensors if n.endswith(f"q_proj.{part}"))
    if tensor is None:
        del made.tensors[name]
    else:
        made.tensors[name] = tensor
        if damage == "groups of no size":
            made.tensors[name.replace("scales", "qzeros")] = torch.zeros(3, 16, dtype=torch.int32)
    refused(made, tmp_path)


@pytest.mark.parametrize(
    "said",
    [
        {"bits": 8},
        {"bits": 5},
        {"bits": "4"},
        {"checkpoint_format": "marlin"},
        {"checkpoint_format": ["gptq"]},
        {"is_marlin_format": True},
        {"group_size": 2.5},
    ],
    ids=str,
)
def test_contradictions_are_refused(said, tmp_path):
    made = stored(4, 64, True)
    made.config["quantization_config"] |= said
    refused(made, tmp_path)


@pytest.mark.parametrize("lie", ["sym", "order"])
def test_what_only_the_data_say_is_refused_when_it_is_read(lie, tmp_path):
    made = stored(4, 64, lie == "order", order=lie == "order")
    made.config["quantization_config"] |= {"sym": True, "desc_act": False}
    folder = made.write(tmp_path)
    quantport.plan(folder, device="cpu")
    with pytest.raises(CheckpointError) as caught:
        quantport.load(folder, device="cpu")
    assert caught.value.suggestion.startswith({"sym": "sym: false", "order": "desc_act: true"}[lie])


def refused(made: Made, folder: Path) -> None:
    made.write(folder)
    for call in (quantport.plan, quantport.load):
        with pytest.raises(CheckpointError) as caught:
            call(folder, device="cpu")
        assert "gptq" in caught.value.asked
        assert caught.value.found
        assert caught.value.suggestion


keys = st.sampled_from(["bits", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic"])


@settings(max_examples=200, deadline=None)
@given(changes=st.dictionaries(keys, junk, max_size=3))
def test_any_configuration_is_read_or_refused(changes, two_layers):
    said = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False, **changes}
    with contextlib.suppress(CheckpointError):
        found = Gptq().recognize(two_layers, {"quantization_config": said}, BUILTIN)
        assert found is not None
        assert found.layers()


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    with contextlib.closing(
        Checkpoint.open(stored(4, 64, True).write(tmp_path_factory.mktemp("g")))
    ) as source:
        yield source
