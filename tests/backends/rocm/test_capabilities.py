"""What the ROCm room claims and refuses, for hardware that is not here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantport.backend import Accepted, Evidence, Rejected, Request, Status, WeightSpec
from quantport.plugins.registry import Registry
from quantport_rocm.capabilities import ARCHS

HOST = Registry(only=["rocm"])
W8A8 = ("fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "int8")
WEIGHT_ONLY = ("fp8_weight_only", "int8_weight_only", "int4_weight_only")
OCP = ("gfx950", "gfx1200", "gfx1201")
FORMATS = {
    "gfx908": "fp16 bf16 int8",
    "gfx90a": "fp16 bf16 int8",
    "gfx942": "fp16 bf16 int8 e4m3fnuz e5m2fnuz",
    "gfx950": "fp16 bf16 int8 e4m3fn e5m2 mxfp8 mxfp6 mxfp4",
    "gfx1100": "fp16 bf16 int8 int4",
    "gfx1151": "fp16 bf16 int8 int4",
    "gfx1200": "fp16 bf16 int8 int4 e4m3fn e5m2",
    "gfx1201": "fp16 bf16 int8 int4 e4m3fn e5m2",
}


def verdicts(device, scheme, n=64, k=256, dtype=torch.bfloat16):
    request = Request(WeightSpec(HOST.schemes[scheme], n, k), "linear", device, dtype)
    return {v.kernel: v for v in (kernel.verdict(request) for kernel in HOST.kernels("rocm"))}


def simulated(name):
    return HOST.device(f"rocm:{name}")


def native(found):
    return [v for v in found.values() if isinstance(v, Accepted) and v.status is Status.NATIVE]


@pytest.mark.parametrize("name", ARCHS)
def test_facts(name):
    arch = ARCHS[name]
    assert arch.native == set(FORMATS[name].split())
    assert (arch.kind, arch.name, arch.compute) == ("rocm", name, torch.bfloat16)
    assert arch.source
    assert arch.title
    assert arch.family.startswith(("CDNA", "RDNA"))


@pytest.mark.parametrize("scheme", W8A8)
@pytest.mark.parametrize("name", ARCHS)
def test_native_exactly_where_claimed(name, scheme):
    found = verdicts(simulated(name), scheme)
    accepted = native(found)
    assert bool(accepted) is (
        scheme == "int8" or (scheme in ("fp8_per_tensor", "fp8_per_channel") and name in OCP)
    )
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
    assert isinstance(found["rocm._scaled_mm"], Rejected)
    assert isinstance(found["rocm._int_mm"], Rejected)


def test_gfx942_is_told_apart_from_hardware_without_fp8():
    fnuz = [str(r) for r in verdicts(simulated("gfx942"), "fp8_per_channel")["rocm._scaled_mm"].reasons]
    none = [str(r) for r in verdicts(simulated("gfx90a"), "fp8_per_channel")["rocm._scaled_mm"].reasons]
    assert any("gfx942 multiplies e4m3fnuz" in r and "not in this version" in r for r in fnuz)
    assert not any("fnuz" in r for r in none)
    assert any("has no e4m3fn matrix instruction" in r for r in none)


@pytest.mark.parametrize("name", OCP)
def test_e4m3fn_needs_rocm_6_5(name):
    old = replace(simulated(name), simulated=False)
    new = replace(old, features=frozenset({"rocm>=6.5"}))
    assert any("ROCm 6.5" in r.text for r in verdicts(old, "fp8_per_channel")["rocm._scaled_mm"].reasons)
    assert isinstance(verdicts(new, "fp8_per_channel")["rocm._scaled_mm"], Accepted)


def test_shapes_and_dtypes_that_torch_refuses():
    device = simulated("gfx950")
    assert any(
        "multiples of 16" in r.text
        for r in verdicts(device, "fp8_per_channel", n=72)["rocm._scaled_mm"].reasons
    )
    assert any(
        "bfloat16 only" in r.text
        for r in verdicts(device, "fp8_per_channel", dtype=torch.float16)["rocm._scaled_mm"].reasons
    )
    assert any("multiples of 8" in r.text for r in verdicts(device, "int8", k=252)["rocm._int_mm"].reasons)


def test_kernel_names_are_unique():
    names = [kernel.name for kernel in HOST.kernels("rocm")]
    assert len(names) == len(set(names))
