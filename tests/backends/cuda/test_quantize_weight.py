"""The room quantizes weights by Triton while they load, to the bytes of the reference, and declines where
Triton has no kernel.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from agrees import quantizes_as_the_reference

from quantport.scheme.catalog import BUILTIN
from quantport.testing import cases
from quantport.testing.fakes import fake_tensors
from quantport_cuda import detect
from quantport_cuda.detect import CudaBackend
from quantport_triton import weights
from quantport_triton.launch import traced


class Here(CudaBackend):
    """The room with Triton's interpreter as its GPU."""

    torch_type = "cpu"


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("scheme", ["fp8_per_block", "int4_weight_only", "mxfp8", "nvfp4", "nf4"])
def test_the_bytes_of_the_reference(scheme):
    quantizes_as_the_reference(Here().quantize_weight, cases.plain(32, 256), scheme)


def test_it_declines_what_has_no_kernel(monkeypatch):
    weight = cases.plain(32, 256)
    assert Here().quantize_weight(weight, BUILTIN["q4_k"]) is None
    monkeypatch.setattr(
        detect.evidence,
        "refusals",
        lambda *asked: (str(asked),) if asked[:3] == ("cuda", "cpu", "quantize") else (),
    )
    assert Here().quantize_weight(weight, BUILTIN["int8"]) is None


def test_it_declines_without_triton(monkeypatch):
    monkeypatch.setattr(weights, "compiles_for", lambda target: False)
    assert Here().quantize_weight(cases.plain(32, 256), BUILTIN["int8"]) is None


def test_it_launches_on_the_gpu():
    with fake_tensors(), traced("sm_90") as launches:
        weight = torch.empty(64, 256, dtype=torch.bfloat16, device="cuda")
        stored = CudaBackend().quantize_weight(weight, BUILTIN["int8"])
        found = {name: (tuple(t.shape), t.dtype, t.device.type) for name, t in stored.items()}
    assert found == {
        "weight": ((64, 256), torch.int8, "cuda"),
        "weight_scale": ((64, 1), torch.float32, "cuda"),
    }
    assert launches
