"""Checkpoints as msModelSlim stores them, made by hand."""

from __future__ import annotations

import json

import pytest
import torch
from format_checks import Made, contradicts, converts, keeps, overlays, quantizable, tiny

import quantport
from quantport.errors import CheckpointError

CHECKED_BY = "by hand"


def stored(kind: str = "W8A8_DYNAMIC", dtype: torch.dtype = torch.bfloat16, model: str = "llama") -> Made:
    config, tensors = tiny(model)
    values = {}
    said = {"model_quant_type": kind, **dict.fromkeys(tensors, "FLOAT")}
    for name in quantizable(tensors):
        weight = tensors[name].float()
        scale = (weight.abs().amax(1, True) / 127).to(dtype)
        codes = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
        tensors |= {name: codes, f"{name}_scale": scale, f"{name}_offset": torch.zeros_like(scale)}
        said |= dict.fromkeys((name, f"{name}_scale", f"{name}_offset"), kind)
        values[name] = codes.float() * scale.float()
    base = {"W8A8_DYNAMIC": "int8", "W8A16": "int8_weight_only"}.get(kind, "")
    option = {torch.bfloat16: ":bf16", torch.float16: ":fp16", torch.float32: ""}[dtype]
    files = {"quant_model_description.json": json.dumps(said)}
    return Made(config, tensors, values, scheme=base + option, files=files)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["W8A8_DYNAMIC", "W8A16"])
def test_it_is_kept_to_the_bit(kind, dtype, tmp_path):
    keeps(stored(kind, dtype), tmp_path)


def test_experts(tmp_path):
    keeps(stored(model="qwen3_moe"), tmp_path)


def test_it_becomes_another_scheme(tmp_path):
    converts(stored(), tmp_path, "int4_weight_only")


def test_what_was_left_is_quantized(tmp_path):
    overlays(stored(), tmp_path, "lm_head")


@pytest.mark.parametrize("kind", ["W8A8", "W4A8_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC"])
def test_other_kinds_are_refused_by_name(kind, tmp_path):
    stored(kind).write(tmp_path)
    for call in (quantport.plan, quantport.load):
        with pytest.raises(CheckpointError, match=kind):
            call(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"_offset": torch.ones(256, 1)}, "that is not zero"),
        ({"_scale": torch.ones(2, 1)}, "shape [2, 1]"),
        ({"_scale": None}, "no such tensor"),
    ],
    ids=["offset", "scales", "no scale"],
)
def test_a_contradiction_is_refused(change, found, tmp_path):
    contradicts(stored(), tmp_path, {f".weight{key}": tensor for key, tensor in change.items()}, found)
