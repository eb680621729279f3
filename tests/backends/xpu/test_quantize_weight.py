"""The room quantizes weights by Triton while they load, to the bytes of the reference, where Triton has a
backend for Intel GPUs.
"""

from __future__ import annotations

import pytest
import torch
import xpu_stand_in
from agrees import quantizes_as_the_reference

from quantport import quantize_
from quantport.plugins.registry import default_registry
from quantport.scheme.catalog import BUILTIN
from quantport.testing import cases
from quantport.testing.fakes import fake_tensors
from quantport_triton import weights
from quantport_triton.launch import traced
from quantport_xpu.detect import XpuBackend

# Scales of rows, tensors, squares and groups, offsets, powers of two, two levels; codes of six bits, and of a
# code book.
SCHEMES = [
    "int8",
    "fp8_per_tensor",
    "fp8_per_block",
    "int4_weight_only",
    "int4_mse",
    "mxfp8",
    "mxfp4_dualscale",
    "nvfp4",
    "mxfp6_e2m3",
    "nf4",
]
DECLINED = ["q4_k", "int4_hqq", "nf4:double"]


@pytest.fixture
def room():
    with xpu_stand_in.found([xpu_stand_in.gpu("bmg")]):
        yield default_registry().backends["xpu"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_bytes_of_the_reference(room, scheme):
    """tests/backends/triton tests every scheme, and more shapes and values."""
    for weight in (
        cases.plain(7, 160),
        cases.SPECIAL["zero rows"](7, 160),
        cases.SPECIAL["one outlier"](4, 33),
    ):
        quantizes_as_the_reference(room.quantize_weight, weight, scheme)


def test_a_model_is_quantized_by_it(room, monkeypatch):
    asked = []
    real = weights.quantize_weight
    monkeypatch.setattr(
        weights, "quantize_weight", lambda weight, scheme: asked.append(weight.shape) or real(weight, scheme)
    )
    quantize_(torch.nn.Sequential(torch.nn.Linear(256, 64, dtype=torch.bfloat16)), "int8")
    assert asked == [(64, 256)]


@pytest.mark.parametrize("scheme", DECLINED)
def test_it_declines_what_has_no_kernel(room, scheme):
    assert room.quantize_weight(cases.plain(32, 256), BUILTIN[scheme]) is None


def test_it_declines_without_a_triton_for_intel_gpus(room, monkeypatch):
    monkeypatch.setattr(
        "quantport_xpu.kernels.triton.backend_reason", lambda: "the package triton is not installed"
    )
    assert room.quantize_weight(cases.plain(32, 256), BUILTIN["int8"]) is None


def test_it_declines_weights_elsewhere():
    assert XpuBackend().quantize_weight(cases.plain(32, 256), BUILTIN["int8"]) is None


def test_it_launches_on_the_gpu(monkeypatch):
    monkeypatch.setattr("quantport_xpu.kernels.triton.backend_reason", lambda: "")
    with fake_tensors(), traced("bmg") as launches:
        weight = torch.empty(64, 256, dtype=torch.bfloat16, device="xpu")
        stored = XpuBackend().quantize_weight(weight, BUILTIN["int8"])
        found = {name: (tuple(t.shape), t.dtype, t.device.type) for name, t in stored.items()}
    assert found == {
        "weight": ((64, 256), torch.int8, "xpu"),
        "weight_scale": ((64, 1), torch.float32, "xpu"),
    }
    assert launches
    # triton-xpu heeds it: products and sums are rounded one by one
    assert not any(launch.fusion for launch in launches)
