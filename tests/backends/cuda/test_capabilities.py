"""What the CUDA room claims and refuses, for hardware that is not here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantport.backend import Accepted, Evidence, Rejected, Request, Status, WeightSpec
from quantport.host import Host
from quantport_cuda.capabilities import ARCHS

HOST = Host(only=["cuda"])
W8A8 = ("fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "int8")
WEIGHT_ONLY = ("fp8_weight_only", "int8_weight_only", "int4_weight_only")
FP8 = ("fp8_per_tensor", "fp8_per_channel")
NATIVE = {
    "sm_70": (),
    "sm_75": ("int8",),
    "sm_80": ("int8",),
    "sm_86": ("int8",),
    **dict.fromkeys(("sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"), (*FP8, "int8")),
}
FORMATS = {
    "sm_70": "fp16",
    "sm_75": "fp16 int8 int4",
    "sm_80": "fp16 bf16 int8 int4",
    "sm_86": "fp16 bf16 int8 int4",
    "sm_89": "fp16 bf16 int8 int4 e4m3fn e5m2",
    "sm_90": "fp16 bf16 int8 e4m3fn e5m2",
    **dict.fromkeys(
        ("sm_100", "sm_103", "sm_120", "sm_121"), "fp16 bf16 int8 e4m3fn e5m2 mxfp8 mxfp6 mxfp4 nvfp4"
    ),
}  # fmt: skip


def verdicts(device, scheme, n=64, k=256, dtype=torch.bfloat16):
    request = Request(WeightSpec(HOST.schemes[scheme], n, k), "linear", device, dtype)
    return {v.kernel: v for v in (kernel.verdict(request) for kernel in HOST.kernels("cuda"))}


def simulated(name):
    return HOST.device(f"cuda:{name}")


def native(found):
    return [v for v in found.values() if isinstance(v, Accepted) and v.status is Status.NATIVE]


@pytest.mark.parametrize("name", ARCHS)
def test_facts(name):
    arch = ARCHS[name]
    assert arch.native == set(FORMATS[name].split())
    assert (arch.kind, arch.name) == ("cuda", name)
    assert arch.source
    assert arch.title
    assert arch.family in {"Volta", "Turing", "Ampere", "Ada", "Hopper", "Blackwell"}
    assert arch.compute is (torch.float16 if name in ("sm_70", "sm_75") else torch.bfloat16)


@pytest.mark.parametrize("scheme", W8A8)
@pytest.mark.parametrize("name", ARCHS)
def test_native_exactly_where_claimed(name, scheme):
    found = verdicts(simulated(name), scheme)
    accepted = native(found)
    assert bool(accepted) is (scheme in NATIVE[name])
    for verdict in accepted:
        assert verdict.precision == "W8A8"
        assert verdict.claim.evidence is Evidence.DECLARED
        assert ARCHS[name].source in verdict.claim.source
    assert isinstance(found["torch.dequantize"], Accepted)
    assert found["torch.dequantize"].status is Status.WEIGHT_ONLY
    assert found["torch.reference"].status is Status.REFERENCE


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
@pytest.mark.parametrize("name", ARCHS)
def test_weight_only_runs_everywhere(name, scheme):
    found = verdicts(simulated(name), scheme, dtype=ARCHS[name].compute)
    assert native(found) == []
    assert found["torch.dequantize"].status is Status.DEQUANTIZE
    assert found["torch.dequantize"].precision.endswith("A16")
    assert isinstance(found["cuda._scaled_mm"], Rejected)
    assert isinstance(found["cuda._int_mm"], Rejected)


@pytest.mark.parametrize(
    ("name", "scheme", "kernel", "reason"),
    [
        ("sm_80", "fp8_per_channel", "cuda._scaled_mm", "sm_80 (NVIDIA A100, A30) has no e4m3fn matrix instruction"),
        ("sm_70", "int8", "cuda._int_mm", "sm_70 (NVIDIA V100) has no int8 matrix instruction"),
        ("sm_90", "fp8_per_block", "cuda._scaled_mm", "does not run fp8_per_block"),
        ("sm_90", "int8", "cuda._scaled_mm", "does not run int8"),
        ("sm_90", "fp8_per_channel", "cuda._int_mm", "does not run fp8_per_channel"),
    ],
)
def test_refusals_say_why(name, scheme, kernel, reason):
    verdict = verdicts(simulated(name), scheme)[kernel]
    assert isinstance(verdict, Rejected)
    assert any(reason in r for r in verdict.reasons)


def test_shapes_and_dtypes_that_torch_refuses():
    device = simulated("sm_90")
    assert any("multiples of 16" in r for r in verdicts(device, "fp8_per_channel", n=72)["cuda._scaled_mm"].reasons)
    assert any("bfloat16 only" in r for r in verdicts(device, "fp8_per_channel", dtype=torch.float16)["cuda._scaled_mm"].reasons)
    assert any("multiples of 8" in r for r in verdicts(device, "int8", k=252)["cuda._int_mm"].reasons)


@pytest.mark.parametrize("name", ["sm_103", "sm_121"])
def test_new_blackwell_needs_a_build_for_cuda_12_9(name):
    old = replace(simulated(name), simulated=False)
    new = replace(old, features=frozenset({"cuda>=12.9"}))
    assert any("CUDA 12.9" in r for r in verdicts(old, "fp8_per_channel")["cuda._scaled_mm"].reasons)
    assert isinstance(verdicts(new, "fp8_per_channel")["cuda._scaled_mm"], Accepted)


def test_int8_is_said_to_be_slow_on_sm_103_only():
    slow = {name for name in ARCHS for v in native(verdicts(simulated(name), "int8")) if v.slow}
    assert slow == {"sm_103"}


def test_kernel_names_are_unique():
    names = [kernel.name for kernel in HOST.kernels("cuda")]
    assert len(names) == len(set(names))
