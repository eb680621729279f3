"""Formats that are known and not read are refused by name, with what to do."""

from __future__ import annotations

import pytest
import torch
from format_checks import Made, tiny

import quantport
from quantport.errors import CheckpointError
from quantport_formats.not_read import _METHODS


def refused(made: Made, folder) -> CheckpointError:
    made.write(folder)
    for call in (quantport.plan, quantport.load):
        with pytest.raises(CheckpointError) as caught:
            call(folder, device="cpu")
    return caught.value


@pytest.mark.parametrize("method", _METHODS)
def test_a_format_is_refused_by_name(method, tmp_path):
    config, tensors = tiny()
    tensors["model.layers.0.mlp.up_proj.codes"] = torch.ones(4, 4, dtype=torch.uint8)
    made = Made({**config, "quantization_config": {"quant_method": method}}, tensors, {})
    error = refused(made, tmp_path)
    assert method in error.found.lower().replace("optimum-", "")
    assert "16-bit" in error.suggestion or "scheme='fp6'" in error.suggestion


def test_schemes_that_are_named_exist():
    for _, suggestion in _METHODS.values():
        for name in suggestion.split("'")[1::2]:
            assert name in quantport.scheme.catalog.BUILTIN
