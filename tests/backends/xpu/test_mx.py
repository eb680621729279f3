"""MX formats and W4A8 by the vendor's operators: which kernel is chosen where, and deviations that are
exactly those declared.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import xpu_operators

from quantport import numerics
from quantport.backend import Accepted, Evidence, Rejected, Request, Status, WeightSpec
from quantport.planning.select_kernel import select_kernel
from quantport.plugins.registry import Registry
from quantport.testing import cases
from quantport_xpu import vendor
from quantport_xpu.kernels.mx import XpuMxfp4, XpuMxfp4Marlin, XpuMxfp4Quantized

HOST = Registry(only=["xpu"])
N, K = 48, 256
KERNELS = {kernel.name: kernel for kernel in HOST.kernels("xpu")}
DEVIATING = {XpuMxfp4Quantized.name, XpuMxfp4Marlin.name}


@pytest.fixture(autouse=True)
def _operators(xpu_operators_registered):
    """Emulations of the vendors' operators."""


def here(arch="bmg"):
    return replace(HOST.device(f"xpu:{arch}"), features=frozenset(vendor.SCHEMAS))


def ask(scheme, arch="bmg", fallback="weight_only", **request):
    spec = WeightSpec(HOST.schemes[scheme], request.pop("n", 4096), request.pop("k", 4096))
    return select_kernel(Request(spec, "linear", here(arch), **request), HOST.kernels("xpu"), fallback)


def refusal(scheme, kernel, arch="bmg", n=128, k=256, dtype=torch.bfloat16):
    verdict = KERNELS[kernel].verdict(
        Request(WeightSpec(HOST.schemes[scheme], n, k), "linear", here(arch), dtype)
    )
    assert isinstance(verdict, Rejected)
    return " | ".join(map(str, verdict.reasons))


def test_every_deviation_is_tested_here():
    assert {name for name, kernel in KERNELS.items() if kernel.numeric_deviation} == DEVIATING


@pytest.mark.parametrize("arch", ["pvc", "bmg", "xe3p"])
@pytest.mark.parametrize(("scheme", "kernel"), [("mxfp8", "xpu.fp8_gemm_mx"), ("mxfp4", "xpu.fp4_gemm")])
def test_mx_is_storage_and_its_operators_are_the_exact_emulation(scheme, kernel, arch):
    """Both operands are converted before they are multiplied, so these kernels run only on request and are
    never called native.
    """
    exact, default = ask(scheme, arch, "reference"), ask(scheme, arch)
    assert (exact.kernel, exact.status, exact.numeric_deviation) == (kernel, Status.REFERENCE, "")
    assert exact.claim.evidence is Evidence.DECLARED
    assert f"{arch} has no {scheme} matrix instruction" in exact.slow
    assert default.status is Status.WEIGHT_ONLY
    assert default.kernel == (
        "xpu.mm_mxfp4_marlin" if (arch, scheme) == ("pvc", "mxfp4") else "xpu.triton_weight_only"
    )
    assert ask(scheme, arch, "error").status is Status.UNSUPPORTED


def test_the_plan_names_the_tie_rule():
    found = ask("mxfp4:rceil", fallback="reference")
    assert (found.kernel, found.numeric_deviation) == (
        "xpu.fp4_gemm_quantized",
        "ties of activations go toward zero",
    )
    assert not isinstance(
        KERNELS["xpu.fp4_gemm_quantized"].verdict(
            Request(WeightSpec(HOST.schemes["mxfp4"], N, K), "linear", here())
        ),
        Accepted,
    )


def test_int4_w4a8_of_the_vendor_is_native():
    for dtype in (torch.bfloat16, torch.float16):
        found = ask("int4_w4a8", dtype=dtype)
        assert (found.kernel, found.status, found.precision) == ("xpu.int4_gemm_w4a8", Status.NATIVE, "W4A8")
    assert ask("int4_w4a8", n=4097).kernel == "xpu.triton_int4_int8"


@pytest.mark.parametrize(
    ("scheme", "kernel", "request_", "reason"),
    [
        ("mxfp8", "xpu.fp8_gemm_mx", {"k": 72}, "K to be a multiple of 32, not 72"),
        ("mxfp8", "xpu.fp8_gemm_mx", {"dtype": torch.float32}, "16 bits"),
        ("mxfp4", "xpu.fp4_gemm", {"arch": "arc_a"}, "oneDNN has no e2m1 on arc_a"),
        ("mxfp4_w4a8", "xpu.fp4_gemm", {}, "does not run mxfp4_w4a8"),
        ("nvfp4", "xpu.fp4_gemm", {}, "does not run nvfp4"),
        ("fp8_per_block", "xpu.fp8_gemm_mx", {}, "does not run fp8_per_block"),
        ("mxfp4", "xpu.mm_mxfp4_marlin", {}, "written for Xe-HPC, not for Xe2"),
        ("mxfp4", "xpu.mm_mxfp4_marlin", {"arch": "pvc", "n": 64}, "multiples of 128, not 64 x 256"),
        (
            "mxfp4",
            "xpu.mm_mxfp4_marlin",
            {"arch": "pvc", "dtype": torch.float16},
            "reads activations as bfloat16",
        ),
        ("int4_w4a8", "xpu.int4_gemm_w4a8", {"n": 60}, "N to be a multiple of 8, not 60"),
        ("int4_weight_only", "xpu.int4_gemm_w4a8", {}, "does not run int4_weight_only"),
        ("int4_w4a8:static_asym", "xpu.int4_gemm_w4a8", {}, "drowns the rest"),
    ],
)
def test_refusals_say_why(scheme, kernel, request_, reason):
    assert reason in refusal(scheme, kernel, **request_)


def toward_zero(x):
    """MXFP4 with the scales of ``rceil`` and ties toward zero: an fp64 search over all codes, the smaller
    magnitude first.
    """
    groups = x.double().view(len(x), -1, 32)
    amax = groups.abs().amax(2, keepdim=True)
    _, exponent = torch.frexp(amax / 6)
    scale = torch.ldexp(
        torch.ones_like(amax),
        torch.where(amax / 6 == torch.ldexp(torch.ones_like(amax), exponent - 1), exponent - 1, exponent),
    )
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    nearest = ((groups / scale).abs().unsqueeze(3) - values).abs().min(3).indices  # the first of equals
    return torch.where(amax == 0, 0, values[nearest] * scale * groups.sign()).view(x.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_go_toward_zero_and_nothing_else_differs(dtype):
    spec = WeightSpec(HOST.schemes["mxfp4:rceil"], N, K)
    steps = torch.arange(-24, 25) / 4  # every tie, every value, and what saturates nothing
    tied = torch.cat((steps, torch.zeros(K - len(steps)))).repeat(3, 1) * torch.tensor(
        [[1.0], [2.0**-9], [2.0**6]]
    )
    tied[:, 31::32] = 6 * torch.tensor([[1.0], [2.0**-9], [2.0**6]])
    stored = numerics.quantize_weight(cases.plain(N, K), spec.scheme)
    weight = numerics.dequantize_weight(stored, spec.scheme, K, torch.float32).double()
    for x in (tied.to(dtype), cases.activations(7, K, dtype)):
        found, exact = (k.run(x, k.pack(stored, spec), None, spec) for k in (XpuMxfp4Quantized(), XpuMxfp4()))
        assert cases.relative_error(found, toward_zero(x) @ weight.t()) < 2.0**-8
        assert cases.relative_error(exact, numerics.linear(x, stored, spec.scheme, None)) < 2.0**-8
    found, exact = (
        k.run(tied.to(dtype), k.pack(stored, spec), None, spec) for k in (XpuMxfp4Quantized(), XpuMxfp4())
    )
    assert cases.relative_error(found, exact.double()) > 2.0**-6  # the deviation is seen


def test_the_codes_of_every_tie():
    """Golden: 0.25 to 0, 0.75 to 0.5, 1.25 to 1, 1.75 to 1.5, 2.5 to 2, 3.5 to 3, 5 to 4; the scale 2 **
    ceil(log2(amax / 6)).
    """
    x = torch.zeros(1, 32)
    x[0, :16] = torch.tensor(
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, -6.0]
    )
    codes, scale = XpuMxfp4Quantized().quantize(x, HOST.schemes["mxfp4:rceil"].activation)
    assert scale.view(torch.uint8).tolist() == [[127]]
    assert bytes(codes[0].tolist()).hex() == "10325476" + "98badcfe" + "00" * 8
    q, _ = numerics.quantize(x, HOST.schemes["mxfp4:rceil"].activation)
    assert bytes(numerics.pack_bits(q, 4)[0].tolist()).hex() == "20426476" + "a8caecfe" + "00" * 8


def test_the_scale_follows_rceil():
    x = torch.zeros(5, 32)
    x[:, 0] = torch.tensor([6.0, 6.25, 5.0, 6 * 2.0**-40, 0.0])
    _, scale = XpuMxfp4Quantized().quantize(x, HOST.schemes["mxfp4:rceil"].activation)
    _, expected = numerics.quantize(x, HOST.schemes["mxfp4:rceil"].activation)
    assert scale[:4].view(torch.uint8).tolist() == expected[:4].tolist()


def test_the_smallest_scale_is_read_as_zero():
    """By ``mm_mxfp4_out_marlin``; every other scale is exact."""
    kernel, spec = XpuMxfp4Marlin(), WeightSpec(HOST.schemes["mxfp4_weight_only"], 128, 128)
    stored = numerics.quantize_weight(cases.plain(128, 128), spec.scheme)
    stored["weight_scale"][:64] = torch.tensor([0, 1, 126, 127]).to(torch.uint8)
    x = cases.activations(3, 128, torch.bfloat16)
    lost = {**stored, "weight_packed": stored["weight_packed"].clone()}
    lost["weight_packed"][:64, :16] = 0
    y = kernel.run(x, kernel.pack(stored, spec), None, spec)
    assert torch.equal(y, kernel.run(x, kernel.pack(lost, spec), None, spec))
    assert cases.relative_error(y, numerics.linear(x, lost, spec.scheme, None)) <= kernel.tolerance


def test_w4a8_survives_what_fp16_does_not_hold():
    """Scales, tokens and results far beyond fp16, too large and too small."""
    kernel, spec = KERNELS["xpu.int4_gemm_w4a8"], WeightSpec(HOST.schemes["int4_w4a8"], 64, 1024)
    for size in (1e-30, 1e-6, 1e4, 1e10):
        stored = numerics.quantize_weight(cases.plain(64, 1024).float() * size, spec.scheme)
        for x in (
            cases.activations(3, 1024, torch.bfloat16) * 1e4,
            cases.activations(3, 1024, torch.bfloat16) * 1e-6,
        ):
            y = kernel.run(x, kernel.pack(stored, spec), None, spec)
            assert cases.relative_error(y, numerics.linear(x, stored, spec.scheme, None)) <= kernel.tolerance


def test_w4a8_loses_one_group_to_a_scale_that_is_not_finite():
    kernel, spec = KERNELS["xpu.int4_gemm_w4a8"], WeightSpec(HOST.schemes["int4_w4a8"], 64, 256)
    stored = numerics.quantize_weight(cases.plain(64, 256), spec.scheme)
    stored["weight_scale"][5, 1] = torch.nan
    x = cases.activations(3, 256, torch.bfloat16)
    y = kernel.run(x, kernel.pack(stored, spec), None, spec)
    assert torch.isnan(y[:, 5]).all()
    assert torch.isfinite(torch.cat((y[:, :5], y[:, 6:]), 1)).all()


def test_emulated_codes_are_those_of_the_format():
    codes = torch.arange(16, dtype=torch.uint8).view(1, -1)
    pairs = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.float4_e2m1fn_x2)
    assert torch.equal(xpu_operators.e2m1(pairs), numerics.values_of("e2m1").view(1, -1))
