"""MXFP8 of Transformers, decoded by it (5.23) and by hand: ``value = code * 2 ** (exponent - 127)``."""

from __future__ import annotations

import pytest
import torch
from format_checks import EXPERTS, Made, converts, experts_of, keeps, overlays, quantizable, tiny
from small_floats import mxfp8
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

import quantport
from quantport.errors import CheckpointError

CHECKED_BY = "Transformers 5.23"


def quantized(kind="llama", dtype=torch.uint8, stacked=False):
    config, tensors = tiny(kind)
    method = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
    values = {}
    for name in quantizable(tensors):
        codes, exponents, by_hand = mxfp8(tensors[name])
        scales = exponents.view(torch.float8_e8m0fnu)
        values[name] = _dequantize_fp8_weight(codes, scales, [1, 32], torch.float32)
        assert torch.equal(values[name], by_hand)
        tensors |= {name: codes, f"{name}_scale_inv": exponents.view(dtype)}
    if stacked:
        path = "model.layers.0.mlp.experts"
        for end in ("", "_scale_inv"):
            each = [
                {p: tensors.pop(f"{path}.{e}.{p}.weight{end}") for p in ("gate_proj", "up_proj", "down_proj")}
                for e in range(EXPERTS["num_experts"])
            ]
            both = [
                torch.cat((x["gate_proj"].view(torch.uint8), x["up_proj"].view(torch.uint8))) for x in each
            ]
            down = torch.stack([x["down_proj"].view(torch.uint8) for x in each])
            kinds = dtype if end else torch.float8_e4m3fn
            tensors[f"{path}.gate_up_proj{end}"] = torch.stack(both).view(kinds)
            tensors[f"{path}.down_proj{end}"] = down.view(kinds)
    return Made({**config, "quantization_config": method}, tensors, values, "mxfp8")


CASES = {
    "bytes": (),
    "exponents": ("llama", torch.float8_e8m0fnu),
    "experts": ("qwen3_moe",),
    "stacked experts": ("qwen3_moe", torch.uint8, True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_kept_to_the_bit(case, tmp_path):
    model = keeps(quantized(*case), tmp_path)
    assert len(experts_of(model)) == ("qwen3_moe" in case)


@pytest.mark.parametrize("case", [CASES["exponents"], CASES["stacked experts"]])
def test_it_becomes_another_scheme(case, tmp_path):
    converts(quantized(*case), tmp_path)


def test_what_was_left_is_quantized(tmp_path):
    overlays(quantized(), tmp_path, "lm_head")


def test_static_scales_are_named(tmp_path):
    made = quantized()
    made.tensors["model.layers.0.mlp.up_proj.activation_scale"] = torch.tensor(0.1)
    assert any("1 static scales" in said for said in quantport.plan(made.write(tmp_path)).warnings)


@pytest.mark.parametrize("damage", ["absent", "shape", "dtype", "block", "vector"])
def test_what_is_wrong_is_refused(damage, tmp_path):
    made = quantized()
    name = next(n for n in made.tensors if n.endswith("_scale_inv"))
    if damage == "absent":
        del made.tensors[name]
    elif damage == "block":
        made.config["quantization_config"]["weight_block_size"] = {"a": [1, 64]}
    elif damage == "vector":
        made.tensors[name.removesuffix("_scale_inv")] = torch.ones(128).to(torch.float8_e4m3fn)
    else:
        made.tensors[name] = torch.ones(3, 3, dtype=torch.uint8) if damage == "shape" else torch.ones(128, 4)
    with pytest.raises(CheckpointError) as caught:
        quantport.plan(made.write(tmp_path), device="cpu")
    assert "as mxfp8" in caught.value.asked
