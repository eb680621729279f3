"""What the XPU room claims and refuses, for hardware that is not here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.torch_version import TorchVersion

from quantport.backend import Accepted, Evidence, Rejected, Request, Status, WeightSpec
from quantport.planning.select_kernel import select_kernel
from quantport.plugins.registry import Registry
from quantport_triton.launch import target_of, traced
from quantport_xpu import vendor
from quantport_xpu.capabilities import ARCHS
from quantport_xpu.kernels import operators

HOST = Registry(only=["xpu"])
# What a linear layer of 4096 x 4096 gets, for each scheme and architecture. Small letters: with 16-bit
# activations, where 8 or 4
# bits were asked for.
KERNELS = {
    "S": "xpu._scaled_mm",
    "I": "xpu._int_mm",
    "Q": "xpu.triton_int4_int8",
    "P": "xpu._weight_int8pack_mm",
    "F": "xpu._weight_int4pack_mm",
    "W": "xpu.triton_weight_only",
    "w": "xpu.triton_weight_only",
    "d": "torch.dequantize",
    "=": "torch.linear",
}
STATUS = {"w": Status.WEIGHT_ONLY, "d": Status.DEQUANTIZE}  # the others are native
INTERPRETED = "QWw"  # the others are declared
TABLE = """
                      pvc arc_a bmg lnl ptl xe3p
fp8_per_tensor         w    w    w   w   w   S
fp8_per_channel        w    w    w   w   w   S
fp8_per_block          w    w    w   w   w   w
fp8_weight_only        W    W    W   W   W   W
fp6                    W    W    W   W   W   W
int8                   I    I    I   I   I   I
int8_weight_only       P    P    P   P   P   P
int4_weight_only       F    F    F   F   F   F
int4_weight_only_g32   F    F    F   F   F   F
int4_w4a8              Q    Q    Q   Q   Q   Q
int4_mse               W    W    W   W   W   W
int4_hqq               W    W    W   W   W   W
mxfp8                  w    w    w   w   w   w
mxfp8_weight_only      W    W    W   W   W   W
mxfp6_e2m3             w    w    w   w   w   w
mxfp6_e3m2             w    w    w   w   w   w
mxfp4                  w    w    w   w   w   w
mxfp4_weight_only      W    W    W   W   W   W
mxfp4_w4a8             w    w    w   w   w   w
mxfp4_dualscale        w    w    w   w   w   w
nvfp4                  w    w    w   w   w   w
nvfp4_weight_only      W    W    W   W   W   W
nf4                    W    W    W   W   W   W
fp4                    W    W    W   W   W   W
q4_0                   d    d    d   d   d   d
q4_1                   d    d    d   d   d   d
q5_0                   d    d    d   d   d   d
q5_1                   d    d    d   d   d   d
q8_0                   d    d    d   d   d   d
q2_k                   d    d    d   d   d   d
q3_k                   d    d    d   d   d   d
q4_k                   d    d    d   d   d   d
q5_k                   d    d    d   d   d   d
q6_k                   d    d    d   d   d   d
bf16                   =    =    =   =   =   =
"""
LINES = [line.split() for line in TABLE.strip().splitlines()]
EXPECTED = {line[0]: dict(zip(LINES[0], line[1:], strict=True)) for line in LINES[1:]}
ALL = frozenset(vendor.SCHEMAS)


def ask(device, scheme, n=4096, k=4096, dtype=torch.bfloat16, fallback="weight_only"):
    return select_kernel(
        Request(WeightSpec(HOST.schemes[scheme], n, k), "linear", device, dtype),
        HOST.kernels("xpu"),
        fallback,
    )


def verdicts(device, scheme, n=64, k=256, dtype=torch.bfloat16):
    request = Request(WeightSpec(HOST.schemes[scheme], n, k), "linear", device, dtype)
    return {v.kernel: v for v in (kernel.verdict(request) for kernel in HOST.kernels("xpu"))}


def simulated(name):
    return HOST.device(f"xpu:{name}")


def refusal(device, scheme, kernel, **request):
    verdict = verdicts(device, scheme, **request)[kernel]
    assert isinstance(verdict, Rejected)
    return " | ".join(map(str, verdict.reasons))


@pytest.fixture
def here(monkeypatch):
    """A Battlemage GPU with a torch and a Triton that have everything, and all the operators of
    vllm-xpu-kernels.
    """
    monkeypatch.setattr(operators, "registered", lambda name: True)
    monkeypatch.setattr("quantport_xpu.kernels.triton.backend_reason", lambda: "")
    return replace(simulated("bmg"), simulated=False, features=ALL)


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


def test_the_table_is_of_what_there_is():
    """A scheme that is new in the core needs no line: the conformance suite checks what follows from its
    facts.
    """
    assert set(EXPECTED) <= set(HOST.schemes)
    assert set(LINES[0]) == set(ARCHS)


@pytest.mark.parametrize("scheme", EXPECTED)
def test_what_a_linear_layer_gets(scheme):
    asked = HOST.schemes[scheme]
    for name, cell in EXPECTED[scheme].items():
        found = ask(simulated(name), scheme)
        status = STATUS.get(cell, Status.NATIVE)
        assert (found.kernel, found.status) == (KERNELS[cell], status), name
        assert found.precision == (asked.weight_only if status is Status.WEIGHT_ONLY else asked).precision
        assert found.claim.evidence is (Evidence.INTERPRETED if cell in INTERPRETED else Evidence.DECLARED), (
            name
        )
        assert found.speed is None  # nothing is measured
        if cell in "SI":
            assert ARCHS[name].source in found.claim.source
        if cell in INTERPRETED:
            assert f"not compiled for {name}" in found.claim.source


@pytest.mark.parametrize("scheme", HOST.schemes)
def test_something_runs_everywhere(scheme):
    for name in ARCHS:
        for shape in ((1, 1), (33, 96), (4096, 4096)):
            found = verdicts(simulated(name), scheme, *shape)
            assert isinstance(found["torch.linear" if scheme == "bf16" else "torch.dequantize"], Accepted)


@pytest.mark.parametrize("name", ARCHS)
def test_fp8_before_xe3p_is_storage_and_says_so(name):
    device = simulated(name)
    found = ask(device, "fp8_per_channel", fallback="reference")
    exact = ask(device, "fp8_per_channel", fallback="error")
    if name == "xe3p":
        assert found.kernel == exact.kernel == "xpu._scaled_mm"
        assert "multiplies e4m3fn natively" in refusal(device, "fp8_per_channel", "xpu._scaled_mm_emulated")
        return
    assert exact.status is Status.UNSUPPORTED
    assert (found.kernel, found.status, found.precision) == (
        "xpu._scaled_mm_emulated",
        Status.REFERENCE,
        "W8A8",
    )
    for said in (found.slow, refusal(device, "fp8_per_channel", "xpu._scaled_mm")):
        assert f"on {name}, oneDNN converts e4m3fn to a wider type before it multiplies" in said
        assert "oneDNN doc/common_concepts/data_types.md" in said
    weight_only = ask(device, "fp8_per_channel")
    assert (weight_only.status, weight_only.precision) == (Status.WEIGHT_ONLY, "W8A16")
    assert any("converts e4m3fn" in reason for reason in weight_only.reasons)


@pytest.mark.parametrize(
    ("scheme", "kernel", "without"),
    [
        ("fp8_per_tensor", "xpu.fp8_gemm_w8a16", "xpu.triton_weight_only"),
        ("fp8_per_channel", "xpu.fp8_gemm_w8a16", "xpu.triton_weight_only"),
        ("fp8_per_block", "xpu.fp8_gemm_w8a16", "xpu.triton_weight_only"),
        ("fp8_weight_only", "xpu.fp8_gemm_w8a16", "xpu.triton_weight_only"),
        ("int4_weight_only", "xpu._weight_int4pack_mm", "xpu._weight_int4pack_mm"),
        ("int8", "xpu._int_mm", "xpu._int_mm"),
    ],
)
def test_operators_of_the_vendor_are_used_where_they_are_found(here, scheme, kernel, without):
    found, less = ask(here, scheme), ask(replace(here, features=frozenset()), scheme)
    assert (found.kernel, less.kernel) == (kernel, without)
    assert found.status is not Status.NATIVE or scheme in ("fp8_weight_only", "int4_weight_only", "int8")
    if kernel == "xpu.fp8_gemm_w8a16":
        reasons = next(v for v in less.verdicts if v.kernel == kernel).reasons
        assert any(
            "fp8_gemm_w8a16(Tensor A" in r.text and "of vllm-xpu-kernels, which was not found" in r.text
            for r in reasons
        )


@pytest.mark.parametrize("scheme", ["fp8_per_tensor", "fp8_per_channel", "fp8_per_block"])
def test_fp8_of_the_vendor_is_native_on_xe3p_alone(here, scheme):
    xe3p = replace(here, arch=ARCHS["xe3p"])
    found = ask(xe3p, scheme, dtype=torch.float16)
    assert (found.kernel, found.status, found.precision) == ("xpu.fp8_gemm", Status.NATIVE, "W8A8")
    assert ask(xe3p, scheme).kernel == ("xpu.fp8_gemm" if scheme == "fp8_per_block" else "xpu._scaled_mm")
    assert "bmg (Intel Arc B, Arc Pro B) has no e4m3fn matrix instruction" in refusal(
        here, scheme, "xpu.fp8_gemm", n=256, k=256
    )


def test_int4_of_the_vendor_stands_in_where_torch_has_none(here, monkeypatch):
    monkeypatch.setattr(operators, "registered", lambda name: "int4" not in name)
    assert ask(here, "int4_weight_only").kernel == "xpu.int4_gemm_w4a16"


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [
        ("int8", "torch.dequantize"),
        ("int8_weight_only", "torch.dequantize"),
        ("int4_weight_only", "torch.dequantize"),
    ],
)
def test_what_is_left_on_a_gpu_with_torch_alone_and_an_old_one(here, scheme, kernel, monkeypatch):
    monkeypatch.setattr(operators, "registered", lambda name: False)
    monkeypatch.setattr("quantport_xpu.kernels.triton.backend_reason", lambda: "no Triton for Intel GPUs")
    found = ask(replace(here, features=frozenset()), scheme)
    assert found.kernel == kernel
    assert any("no Triton for Intel GPUs" in reason for reason in found.reasons)
    assert any("has no aten::_weight_int" in reason for reason in found.reasons)


def test_int8_by_triton_where_torch_has_no_operator(here, monkeypatch):
    monkeypatch.setattr(operators, "registered", lambda name: name != "_int_mm")
    found = ask(here, "int8")
    assert (found.kernel, found.status, found.claim.evidence) == (
        "xpu.triton_int8",
        Status.NATIVE,
        Evidence.INTERPRETED,
    )


def test_an_unknown_gpu_gets_16_bits(here):
    arch = replace(
        here.arch, name="xe_0x9", title="unknown Intel architecture", native=frozenset({"fp16", "bf16"})
    )
    found = ask(replace(here, arch=arch), "int8")
    assert (found.kernel, found.status) == ("xpu._weight_int8pack_mm", Status.WEIGHT_ONLY)
    old = replace(arch, native=frozenset({"fp16"}))
    assert "has no bf16" in refusal(replace(here, arch=old), "nf4", "xpu.triton_weight_only")
    assert ask(replace(here, arch=old), "nf4", dtype=torch.float16).kernel == "xpu.triton_weight_only"


@pytest.mark.parametrize(
    ("scheme", "kernel", "request_", "reason"),
    [
        ("fp8_per_channel", "xpu._scaled_mm", {"n": 72}, "multiples of 16"),
        ("fp8_per_channel", "xpu._scaled_mm", {"dtype": torch.float16}, "bfloat16 only"),
        (
            "int4_weight_only",
            "xpu._weight_int4pack_mm",
            {"k": 200},
            "a multiple of the group of 128, not 200",
        ),
        (
            "int4_weight_only",
            "xpu._weight_int4pack_mm",
            {"dtype": torch.float16},
            "in the dtype of the scales, bfloat16",
        ),
        (
            "int4_weight_only",
            "xpu.int4_gemm_w4a16",
            {"dtype": torch.float16},
            "with scales in the dtype of the activations",
        ),
        ("int4_mse", "xpu._weight_int4pack_mm", {}, "does not run int4_mse"),
        ("int4_hqq", "xpu.int4_gemm_w4a16", {}, "does not run int4_hqq"),
        ("fp8_per_block", "xpu.fp8_gemm_w8a16", {"n": 256, "k": 128}, "two blocks along K, not 256 x 128"),
        ("fp8_per_block", "xpu.fp8_gemm_w8a16", {"n": 72, "k": 256}, "multiples of 128"),
        ("fp8_per_block", "xpu.fp8_gemm", {"n": 256, "k": 128}, "two blocks along K, not 256 x 128"),
        ("fp8_weight_only", "xpu.fp8_gemm", {}, "does not run fp8_weight_only"),
        ("fp8_weight_only", "xpu.fp8_gemm_w8a16", {"dtype": torch.float32}, "16 bits, not torch.float32"),
        ("fp8_per_channel", "xpu._int_mm", {}, "does not run fp8_per_channel"),
        ("int8", "xpu._weight_int4pack_mm", {}, "does not run int8"),
    ],
)
def test_refusals_say_why(here, scheme, kernel, request_, reason):
    assert reason in refusal(replace(here, arch=ARCHS["xe3p"]), scheme, kernel, **request_)


def test_int4_groups_that_onednn_does_not_take(here):
    for group, said in ((16, "multiples of 32, not of 16"), (0, "multiples of 32, not of all of K")):
        weight = replace(HOST.schemes["int4_weight_only"].weight, block_shape=(1, group))
        scheme = replace(HOST.schemes["int4_weight_only"], weight=weight)
        kernel = next(k for k in HOST.kernels("xpu") if k.name == "xpu._weight_int4pack_mm")
        assert any(
            said in r.text
            for r in kernel.verdict(Request(WeightSpec(scheme, 64, 512), "linear", here)).reasons
        )


@pytest.mark.parametrize(
    ("version", "has"),
    [
        ("2.7.0+xpu", ""),
        ("2.8.0+xpu", "F"),
        ("2.9.1+xpu", "FI"),
        ("2.10.0+xpu", "FIPS"),
        ("2.13.0+cpu", "FIPS"),
    ],
)
def test_operators_appear_with_the_version_of_torch(monkeypatch, version, has):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    asked = {"F": "int4_weight_only", "I": "int8", "P": "int8_weight_only", "S": "fp8_per_channel"}
    found = {
        cell
        for cell, scheme in asked.items()
        if isinstance(verdicts(simulated("xe3p"), scheme)[KERNELS[cell]], Accepted)
    }
    assert found == set(has)


def test_a_gpu_that_is_here_is_asked_for_its_operators():
    """Whether this torch is built for XPU or not, its dispatcher decides and not its version."""
    device = replace(simulated("bmg"), simulated=False)
    has = torch._C._dispatch_has_kernel_for_dispatch_key("aten::_int_mm", "XPU")
    assert isinstance(verdicts(device, "int8")["xpu._int_mm"], Accepted) is has
    assert operators.registered("_int_mm") is has
    assert operators.registered("_no_such_operator") is False


def test_triton_is_traced_for_the_architecture():
    with traced("bmg"):
        assert target_of(torch.device("xpu", 0)) == "bmg"
    assert target_of(torch.device("xpu", 0)) == "xpu"  # tuned configurations are the defaults there


def test_kernel_names_are_unique():
    names = [kernel.name for kernel in HOST.kernels("xpu")]
    assert len(names) == len(set(names))
