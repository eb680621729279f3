"""What the XPU room claims and refuses, for hardware that is not here."""

from __future__ import annotations

import pytest
import torch
from torch.torch_version import TorchVersion

from quantport.backend import Accepted, Evidence, Rejected, Request, Status, WeightSpec
from quantport.host import Host
from quantport_xpu.capabilities import ARCHS

HOST = Host(only=["xpu"])
W8A8 = ("fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "int8")
WEIGHT_ONLY = ("fp8_weight_only", "int8_weight_only", "int4_weight_only")


def verdicts(device, scheme, n=64, k=256, dtype=torch.bfloat16):
    request = Request(WeightSpec(HOST.schemes[scheme], n, k), "linear", device, dtype)
    return {v.kernel: v for v in (kernel.verdict(request) for kernel in HOST.kernels("xpu"))}


def simulated(name):
    return HOST.device(f"xpu:{name}")


def native(found):
    return [v for v in found.values() if isinstance(v, Accepted) and v.status is Status.NATIVE]


@pytest.fixture(autouse=True)
def _new_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0+xpu"))


@pytest.mark.parametrize("name", ARCHS)
def test_facts(name):
    arch = ARCHS[name]
    assert arch.native == {"fp16", "bf16", "int8"} | ({"e4m3fn", "e5m2"} if name == "xe3p" else set())
    assert (arch.kind, arch.name, arch.compute) == ("xpu", name, torch.bfloat16)
    assert arch.source
    assert arch.title
    assert arch.family.startswith("Xe")


@pytest.mark.parametrize("scheme", W8A8)
@pytest.mark.parametrize("name", ARCHS)
def test_native_exactly_where_claimed(name, scheme):
    found = verdicts(simulated(name), scheme)
    accepted = native(found)
    assert bool(accepted) is (scheme == "int8" or (name == "xe3p" and scheme in ("fp8_per_tensor", "fp8_per_channel")))
    for verdict in accepted:
        assert verdict.precision == "W8A8"
        assert verdict.claim.evidence is Evidence.DECLARED
        assert ARCHS[name].source in verdict.claim.source
    assert found["torch.dequantize"].status is Status.WEIGHT_ONLY
    assert found["torch.reference"].status is Status.REFERENCE


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
@pytest.mark.parametrize("name", ARCHS)
def test_weight_only_runs_everywhere(name, scheme):
    found = verdicts(simulated(name), scheme)
    assert native(found) == []
    assert found["torch.dequantize"].status is Status.DEQUANTIZE
    assert isinstance(found["xpu._scaled_mm"], Rejected)
    assert isinstance(found["xpu._int_mm"], Rejected)


def test_fp8_before_xe3p_is_refused_because_it_is_converted():
    reasons = verdicts(simulated("bmg"), "fp8_per_channel")["xpu._scaled_mm"].reasons
    assert any("bmg" in r and "converts e4m3fn to a wider type" in r and "oneDNN" in r for r in reasons)


@pytest.mark.parametrize(
    ("version", "scaled", "integer"),
    [("2.8.0+xpu", False, False), ("2.9.1+xpu", False, True), ("2.10.0+xpu", True, True), ("2.13.0+cpu", True, True)],
)
def test_operators_appear_with_the_version_of_torch(monkeypatch, version, scaled, integer):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    device = simulated("xe3p")
    assert isinstance(verdicts(device, "fp8_per_channel")["xpu._scaled_mm"], Accepted) is scaled
    assert isinstance(verdicts(device, "int8")["xpu._int_mm"], Accepted) is integer


def test_kernel_names_are_unique():
    names = [kernel.name for kernel in HOST.kernels("xpu")]
    assert len(names) == len(set(names))
