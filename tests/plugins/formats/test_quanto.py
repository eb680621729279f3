"""Checkpoints as optimum-quanto 0.2.7 stores them, made by hand."""

from __future__ import annotations

import json

import pytest
import torch
from format_checks import Made, contradicts, converts, keeps, overlays, quantizable, tiny

import quantport

CHECKED_BY = "by hand"


def stored(codes: torch.dtype = torch.int8, scale: float = 1.0) -> Made:
    config, tensors = tiny()
    values, kinds = {}, {}
    for name in quantizable(tensors):
        weight, stem = tensors.pop(name), name.removesuffix(".weight")
        top = 127 if codes is torch.int8 else torch.finfo(codes).max
        scales = (weight.abs().amax(1, True).float() / top).bfloat16()
        data = weight.float() / scales
        data = (data.round() if codes is torch.int8 else data).clamp(-top, top).to(codes)
        tensors |= {f"{name}._data": data, f"{name}._scale": scales}
        tensors |= {f"{stem}.{end}": torch.tensor(scale) for end in ("input_scale", "output_scale")}
        values[name] = data.float() * scales.float()
        kinds[stem] = {"weights": "qint8", "activations": "none"}
    base = {torch.int8: "int8_weight_only", torch.float8_e4m3fn: "fp8_weight_only"}.get(codes, "")
    files = {"quanto_qmap.json": json.dumps(kinds)}
    return Made(config, tensors, values, scheme=f"{base}:bf16", files=files)


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_it_is_kept_to_the_bit(codes, tmp_path):
    keeps(stored(codes), tmp_path)


def test_it_becomes_another_scheme(tmp_path):
    converts(stored(), tmp_path, "int4_weight_only")


def test_what_was_left_is_quantized(tmp_path):
    overlays(stored(), tmp_path, "lm_head")


def test_static_scales_are_said_where_they_were_calibrated(tmp_path, recwarn):
    keeps(stored(), tmp_path / "a")
    assert not [w for w in recwarn if "static scales" in str(w.message)]
    stored(scale=0.5).write(tmp_path / "b")
    with pytest.warns(UserWarning, match="14 static scales of activations"):
        quantport.load(tmp_path / "b", device="cpu")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"_scale": torch.ones(3, 1).bfloat16()}, "shape [3, 1]"),
        ({"_scale": None}, "no such tensor"),
        ({"_data": torch.ones(256, 128, dtype=torch.int16)}, "int16"),
        ({"_data": None, "_data._data": torch.ones(64, 128, dtype=torch.uint8)}, "without the shape"),
    ],
    ids=["scales", "no scale", "dtype", "4 bits"],
)
def test_a_contradiction_is_refused(change, found, tmp_path):
    contradicts(stored(), tmp_path, {f".weight.{key}": tensor for key, tensor in change.items()}, found)
