"""What the CUDA room claims and refuses, for hardware that is not here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantport.backend import Accepted, Evidence, Reason, Rejected, Request, Status, WeightSpec
from quantport.kernels import tuned
from quantport.planning.select_kernel import select_kernel
from quantport.plugins.registry import Registry
from quantport_cuda.capabilities import ARCHS

HOST = Registry(only=["cuda"])
# What a linear layer of 4096 x 4096 gets, for each scheme and architecture.
KERNELS = {
    "S": "cuda._scaled_mm",
    "B": "cuda._scaled_mm_blocks",
    "M": "cuda._scaled_mm_mx",
    "N": "cuda._scaled_mm_nvfp4",
    "b": "cuda.triton_fp8_block",
    "x": "cuda.triton_mx",
    "i": "cuda.triton_int8",
    "q": "cuda.triton_int4_int8",
    "I": "cuda._int_mm",
    "w": "cuda.triton_weight_only",
    "W": "cuda.triton_weight_only",
    "d": "torch.dequantize",
    "=": "torch.linear",
}
STATUS = {"w": Status.WEIGHT_ONLY, "d": Status.DEQUANTIZE}  # the others are native
TABLE = """
                      70 75 80 86 89 90 100 103 120 121
fp8_per_tensor         w  w  w  w  S  S   S   S   S   S
fp8_per_channel        w  w  w  w  S  S   S   S   S   S
fp8_per_block          w  w  w  w  b  B   b   b   b   w
fp8_weight_only        W  W  W  W  W  W   W   W   W   W
fp6                    W  W  W  W  W  W   W   W   W   W
int8                   w  I  i  i  i  i   i   i   i   i
int8_weight_only       W  W  W  W  W  W   W   W   W   W
int4_weight_only       W  W  W  W  W  W   W   W   W   W
int4_weight_only_g32   W  W  W  W  W  W   W   W   W   W
int4_w4a8              w  w  q  q  q  q   q   q   q   q
int4_mse               W  W  W  W  W  W   W   W   W   W
int4_hqq               W  W  W  W  W  W   W   W   W   W
mxfp8                  w  w  w  w  w  w   M   M   M   M
mxfp8_weight_only      W  W  W  W  W  W   W   W   W   W
mxfp6_e2m3             w  w  w  w  w  w   w   w   w   w
mxfp6_e3m2             w  w  w  w  w  w   w   w   w   w
mxfp4                  w  w  w  w  w  w   x   x   x   w
mxfp4_weight_only      W  W  W  W  W  W   W   W   W   W
mxfp4_w4a8             w  w  w  w  w  w   x   x   x   w
mxfp4_dualscale        w  w  w  w  w  w   w   w   w   w
nvfp4                  w  w  w  w  w  w   N   N   N   N
nvfp4_weight_only      W  W  W  W  W  W   W   W   W   W
nf4                    W  W  W  W  W  W   W   W   W   W
fp4                    W  W  W  W  W  W   W   W   W   W
q4_0                   d  d  d  d  d  d   d   d   d   d
q4_1                   d  d  d  d  d  d   d   d   d   d
q5_0                   d  d  d  d  d  d   d   d   d   d
q5_1                   d  d  d  d  d  d   d   d   d   d
q8_0                   d  d  d  d  d  d   d   d   d   d
q2_k                   d  d  d  d  d  d   d   d   d   d
q3_k                   d  d  d  d  d  d   d   d   d   d
q4_k                   d  d  d  d  d  d   d   d   d   d
q5_k                   d  d  d  d  d  d   d   d   d   d
q6_k                   d  d  d  d  d  d   d   d   d   d
bf16                   =  =  =  =  =  =   =   =   =   =
"""
LINES = [line.split() for line in TABLE.strip().splitlines()]
EXPECTED = {line[0]: dict(zip((f"sm_{n}" for n in LINES[0]), line[1:], strict=True)) for line in LINES[1:]}
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
}


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


@pytest.fixture(autouse=True)
def _nothing_is_measured(monkeypatch):
    """Whatever measurements the room has: here it is about what is known without them."""
    monkeypatch.setattr(tuned, "tuned_table", lambda package, arch: {})


def test_the_table_is_of_what_there_is():
    """A scheme that is new in the core needs no line: the conformance suite checks what follows from its
    facts.
    """
    assert set(EXPECTED) <= set(HOST.schemes)
    assert {f"sm_{n}" for n in LINES[0]} == set(ARCHS)


@pytest.mark.parametrize("scheme", EXPECTED)
def test_what_a_linear_layer_gets(scheme):
    asked = HOST.schemes[scheme]
    for name, cell in EXPECTED[scheme].items():
        device = simulated(name)
        found = select_kernel(
            Request(WeightSpec(asked, 4096, 4096), "linear", device, device.arch.compute),
            HOST.kernels("cuda"),
        )
        status = STATUS.get(cell, Status.NATIVE)
        assert (found.kernel, found.status) == (KERNELS[cell], status), name
        assert found.precision == (asked.weight_only if status is Status.WEIGHT_ONLY else asked).precision
        assert found.speed is None  # nothing is measured yet
        if cell in "SBMNI":
            assert found.claim.evidence is Evidence.DECLARED
            assert ARCHS[name].source in found.claim.source


@pytest.mark.parametrize("scheme", HOST.schemes)
def test_something_runs_everywhere(scheme):
    for name in ARCHS:
        for shape in ((1, 1), (33, 96), (4096, 4096)):
            found = verdicts(simulated(name), scheme, *shape, dtype=ARCHS[name].compute)
            assert isinstance(found["torch.linear" if scheme == "bf16" else "torch.dequantize"], Accepted)


def test_blocks_on_sm_90_in_a_build_whose_cublaslt_has_none():
    device = replace(simulated("sm_90"), simulated=False, features=frozenset({"cuda>=12.8"}))
    request = Request(WeightSpec(HOST.schemes["fp8_per_block"], 4096, 4096), "linear", device, torch.bfloat16)
    found = select_kernel(request, HOST.kernels("cuda"))
    assert (found.kernel, found.status) == ("cuda.triton_fp8_block", Status.NATIVE)
    assert any(
        "CUDA 12.9 or later" in r.text
        for v in found.verdicts
        if v.kernel == "cuda._scaled_mm_blocks"
        for r in v.reasons
    )


@pytest.mark.parametrize(
    ("name", "scheme", "kernel", "reason"),
    [
        (
            "sm_80",
            "fp8_per_channel",
            "cuda._scaled_mm",
            "sm_80 (NVIDIA A100, A30) has no e4m3fn matrix instruction",
        ),
        ("sm_70", "int8", "cuda._int_mm", "sm_70 (NVIDIA V100) has no int8 matrix instruction"),
        ("sm_90", "fp8_per_block", "cuda._scaled_mm", "does not run fp8_per_block"),
        ("sm_90", "int8", "cuda._scaled_mm", "does not run int8"),
        ("sm_89", "fp8_per_block", "cuda._scaled_mm_blocks", "on sm_90 only, not on sm_89"),
        ("sm_100", "fp8_per_block", "cuda._scaled_mm_blocks", "on sm_90 only, not on sm_100"),
        ("sm_90", "mxfp8", "cuda._scaled_mm_mx", "sm_90 (NVIDIA H100, H200) has no mxfp8 matrix instruction"),
        (
            "sm_90",
            "nvfp4",
            "cuda._scaled_mm_nvfp4",
            "sm_90 (NVIDIA H100, H200) has no nvfp4 matrix instruction",
        ),
        ("sm_100", "mxfp4", "cuda._scaled_mm_mx", "only when built with MSLK"),
        ("sm_120", "mxfp4", "cuda._scaled_mm_mx", "on compute capability 10.x only, not on sm_120"),
        ("sm_100", "mxfp4_w4a8", "cuda._scaled_mm_mx", "does not run mxfp4_w4a8"),
        ("sm_100", "mxfp4_dualscale", "cuda._scaled_mm_mx", "does not run mxfp4_dualscale"),
        (
            "sm_75",
            "int4_weight_only",
            "cuda._weight_int4pack_mm",
            "sm_75 (NVIDIA T4, RTX 20) has no bf16 matrix instruction",
        ),
        ("sm_90", "fp8_per_channel", "cuda._int_mm", "does not run fp8_per_channel"),
    ],
)
def test_refusals_say_why(name, scheme, kernel, reason):
    verdict = verdicts(simulated(name), scheme)[kernel]
    assert isinstance(verdict, Rejected)
    assert any(reason in r.text for r in verdict.reasons)


def test_shapes_and_dtypes_that_torch_refuses():
    device = simulated("sm_90")
    assert any(
        "multiples of 16" in r.text
        for r in verdicts(device, "fp8_per_channel", n=72)["cuda._scaled_mm"].reasons
    )
    assert any(
        "bfloat16 only" in r.text
        for r in verdicts(device, "fp8_per_channel", dtype=torch.float16)["cuda._scaled_mm"].reasons
    )
    assert any("multiples of 8" in r.text for r in verdicts(device, "int8", k=252)["cuda._int_mm"].reasons)
    for shape in ((64, 256), (256, 192)):
        assert any(
            "multiples of 128" in r.text
            for r in verdicts(device, "fp8_per_block", *shape)["cuda._scaled_mm_blocks"].reasons
        )
    for shape in ((72, 256), (64, 48)):
        assert any(
            "of 16 and K of 32" in r.text
            for r in verdicts(simulated("sm_100"), "mxfp8", *shape)["cuda._scaled_mm_mx"].reasons
        )
    pack = "cuda._weight_int4pack_mm"
    assert any(
        "bfloat16 only" in r.text
        for r in verdicts(device, "int4_weight_only", dtype=torch.float16)[pack].reasons
    )
    assert any("and N of 8" in r.text for r in verdicts(device, "int4_weight_only", n=60)[pack].reasons)
    assert any(
        "the group of 128" in r.text for r in verdicts(device, "int4_weight_only", k=200)[pack].reasons
    )


def test_int4_groups_that_torch_does_not_have():
    scheme = HOST.schemes["int4_weight_only"]
    odd = replace(scheme, weight=replace(scheme.weight, block_shape=(1, 512)))
    kernel = next(k for k in HOST.kernels("cuda") if k.name == "cuda._weight_int4pack_mm")
    verdict = kernel.verdict(Request(WeightSpec(odd, 64, 512), "linear", simulated("sm_90")))
    assert verdict.reasons == (
        Reason("cuda._weight_int4pack_mm takes groups of 32, 64, 128, 256, not of 512"),
    )


@pytest.mark.parametrize(
    ("name", "scheme", "kernel"),
    [("sm_90", "fp8_per_block", "cuda._scaled_mm_blocks"), ("sm_100", "mxfp4", "cuda._scaled_mm_mx")],
)
def test_what_torch_has_from_2_10_on(name, scheme, kernel, monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "scaled_mm", raising=False)
    assert any("2.10" in r.text for r in verdicts(simulated(name), scheme)[kernel].reasons)


@pytest.mark.parametrize("name", ["sm_100", "sm_103"])
def test_mxfp4_in_a_build_that_has_it(name):
    device = replace(
        simulated(name), simulated=False, features=frozenset({"cuda>=12.8", "cuda>=12.9", "mslk"})
    )
    found = select_kernel(
        Request(WeightSpec(HOST.schemes["mxfp4"], 4096, 4096), "linear", device), HOST.kernels("cuda")
    )
    assert (found.kernel, found.precision, found.status) == ("cuda._scaled_mm_mx", "W4A4", Status.NATIVE)


@pytest.mark.parametrize(
    ("scheme", "kernel"), [("mxfp8", "cuda._scaled_mm_mx"), ("nvfp4", "cuda._scaled_mm_nvfp4")]
)
def test_block_formats_need_a_build_that_knows_them(scheme, kernel):
    for name, feature, least in (("sm_100", "cuda>=12.8", "12.8"), ("sm_103", "cuda>=12.9", "12.9")):
        old = replace(simulated(name), simulated=False)
        assert any(
            f"CUDA {least} or later on {name}" in r.text for r in verdicts(old, scheme)[kernel].reasons
        )
        assert isinstance(verdicts(replace(old, features=frozenset({feature})), scheme)[kernel], Accepted)


@pytest.mark.parametrize("name", ["sm_103", "sm_121"])
def test_new_blackwell_needs_a_build_for_cuda_12_9(name):
    old = replace(simulated(name), simulated=False)
    new = replace(old, features=frozenset({"cuda>=12.9"}))
    assert any("CUDA 12.9" in r.text for r in verdicts(old, "fp8_per_channel")["cuda._scaled_mm"].reasons)
    assert isinstance(verdicts(new, "fp8_per_channel")["cuda._scaled_mm"], Accepted)


def test_int8_is_said_to_be_slow_on_sm_103_only():
    slow = {name for name in ARCHS for v in native(verdicts(simulated(name), "int8")) if v.slow}
    assert slow == {"sm_103"}


def test_kernel_names_are_unique():
    names = [kernel.name for kernel in HOST.kernels("cuda")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "scheme", "kernel"),
    [
        ("sm_90", "fp8_per_channel", "cuda._scaled_mm"),
        ("sm_90", "fp8_per_block", "cuda._scaled_mm_blocks"),
        ("sm_89", "fp8_per_block", "torch.dequantize"),
        ("sm_100", "nvfp4", "cuda._scaled_mm_nvfp4"),
        ("sm_80", "int8", "cuda._int_mm"),
        ("sm_80", "int4_mse", "cuda._weight_int4pack_mm"),
        ("sm_80", "int4_w4a8", "cuda._weight_int4pack_mm"),
        ("sm_75", "int4_weight_only", "torch.dequantize"),
        ("sm_80", "nf4", "torch.dequantize"),
    ],
)
def test_what_is_left_without_triton(name, scheme, kernel, monkeypatch):
    monkeypatch.setattr(
        "quantport_triton.kernels.base.available", lambda: "the package triton is not installed"
    )
    device = replace(simulated(name), simulated=False, features=frozenset({"cuda>=12.8", "cuda>=12.9"}))
    found = select_kernel(
        Request(WeightSpec(HOST.schemes[scheme], 4096, 4096), "linear", device, device.arch.compute),
        HOST.kernels("cuda"),
    )
    assert found.kernel == kernel
    refused = [
        v for v in found.verdicts if v.kernel.startswith("cuda.triton") and not getattr(v, "unrelated", False)
    ]
    assert all("not installed" in " ".join(map(str, v.reasons)) for v in refused)
