"""Kernels of ATen and of ``vllm-xpu-kernels`` on the CPU, against operators that read operands as their
sources do.

Where ATen has the operator for the CPU too (``_int_mm``, ``_scaled_mm``, ``_weight_int8pack_mm``), that runs.
The others (``xpu_operators.py``) are registered with the vendors' schemas, so that torch's dispatcher refuses
a wrong keyword, type or number of arguments.
"""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from agrees import packing_loses_nothing
from xpu_runs import BMG, RUNS

from quantport import numerics
from quantport.backend import Accepted, Request, WeightSpec
from quantport.scheme.catalog import BUILTIN
from quantport.testing import cases
from quantport.testing.check_runs import compare, make_job
from quantport_xpu import vendor
from quantport_xpu.kernels.scaled import XpuIntMM, XpuScaledMM
from quantport_xpu.kernels.vendor import XpuFp8Gemm, XpuFp8W8A16, XpuInt4W4A16
from quantport_xpu.kernels.weight_only import XpuInt4Pack, XpuInt8Pack

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _operators(xpu_operators_registered):
    """Emulations of the vendors' operators."""


IDS = [f"{kernel.name}-{scheme}" for kernel, scheme, *_ in RUNS]


@pytest.mark.parametrize(("kernel", "scheme", "device", "shapes"), RUNS, ids=IDS)
def test_meets_the_reference(kernel, scheme, device, shapes):
    for n, k in shapes:
        spec = WeightSpec(BUILTIN[scheme], n, k)
        assert isinstance(kernel.verdict(Request(spec, "linear", device, torch.bfloat16)), Accepted)
        jobs = [
            make_job(
                spec,
                numerics.quantize_weight(cases.plain(n, k), spec.scheme),
                cases.activations(rows, k, torch.bfloat16),
                bias,
                kernel.quantizes_activations,
            )
            for rows, bias in ((1, None), (6, None), (17, cases.bias(n, torch.bfloat16)), (130, None))
        ]
        assert compare(kernel, jobs, CPU) == ""


@pytest.mark.parametrize(("kernel", "scheme", "device", "shapes"), RUNS, ids=IDS)
def test_special_weights(kernel, scheme, device, shapes):
    (n, k), spec = shapes[0], WeightSpec(BUILTIN[scheme], *shapes[0])
    for name, make in cases.specials(spec.scheme):
        job = make_job(
            spec,
            numerics.quantize_weight(make(n, k), spec.scheme),
            cases.activations(5, k, torch.bfloat16),
            None,
            kernel.quantizes_activations,
        )
        assert compare(kernel, [job], CPU) == "", name


@pytest.mark.parametrize(("kernel", "scheme", "device", "shapes"), RUNS, ids=IDS)
def test_packing_loses_nothing_and_no_rows_are_no_rows(kernel, scheme, device, shapes):
    packing_loses_nothing(kernel, scheme, shapes)


@pytest.mark.parametrize(
    ("kernel", "scheme"),
    [(XpuIntMM(), "int8"), (XpuInt8Pack(), "int8_weight_only"), (XpuFp8W8A16(), "fp8_weight_only")],
)
def test_fp16(kernel, scheme):
    spec = WeightSpec(BUILTIN[scheme], 64, 96)
    assert isinstance(kernel.verdict(Request(spec, "linear", BMG, torch.float16)), Accepted)
    x, bias = cases.activations(5, 96, torch.float16), cases.bias(64, torch.float16)
    assert (
        compare(
            kernel,
            [
                make_job(
                    spec,
                    numerics.quantize_weight(cases.plain(64, 96), spec.scheme),
                    x,
                    bias,
                    kernel.quantizes_activations,
                )
            ],
            CPU,
        )
        == ""
    )


def test_int4_agrees_with_the_operator_of_the_cpu():
    """``_weight_int4pack_mm_for_cpu`` computes ``(code - 8) * scale + 0`` from codes that it packs in a
    layout of its own.
    """
    spec = WeightSpec(BUILTIN["int4_weight_only_g32"], 64, 256)
    stored = numerics.quantize_weight(cases.plain(64, 256), spec.scheme)
    codes = numerics.unpack_int4(stored["weight_packed"], 256).int() + 8
    scale = stored["weight_scale"].t()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    x = cases.activations(17, 256, torch.bfloat16)
    expected = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x, packed, 32, torch.stack((scale, torch.zeros_like(scale)), -1).contiguous()
    )
    for kernel in (XpuInt4Pack(), XpuInt4W4A16()):
        y = kernel.run(x, kernel.pack(stored, spec), None, spec)
        assert cases.relative_error(y, expected) < kernel.tolerance


def flipped_nibbles(packed):
    return torch.stack([packed[0] >> 4 & 0x0F0F0F0F | (packed[0] & 0x0F0F0F0F) << 4]).view_as(
        packed[0]
    ), *packed[1:]


INT4 = (XpuInt4Pack(), "int4_weight_only_g32", (64, 256))
MISTAKES = [
    ("nibbles in the other order", *INT4, flipped_nibbles),
    ("zero of 7", *INT4, lambda p: (p[0], p[1], p[2] - 1)),
    ("zero of 0: signed codes", *INT4, lambda p: (p[0], p[1], p[2] * 0)),
    ("scales not transposed", *INT4, lambda p: (p[0], p[1].t().contiguous(), p[2])),
    (
        "scales in the order of the stored tensor",
        *INT4,
        lambda p: (p[0], p[1].t().contiguous().view_as(p[1]), p[2]),
    ),
    ("scales with strides of the stored tensor", *INT4, lambda p: (p[0], p[1].t().contiguous().t(), p[2])),
    ("scales in fp32", *INT4, lambda p: (p[0], p[1].float(), p[2])),
    ("zeros in bf16, as CUDA has them", *INT4, lambda p: (p[0], p[1], p[2].bfloat16())),
    ("zeros of another shape", *INT4, lambda p: (p[0], p[1], p[2][:1])),
    ("codes in bytes", *INT4, lambda p: (p[0].view(torch.uint8), *p[1:])),
    ("int8 scales in bf16", XpuInt8Pack(), "int8_weight_only", (64, 256), lambda p: (p[0], p[1].bfloat16())),
    ("int8 transposed", XpuInt8Pack(), "int8_weight_only", (64, 256), lambda p: (p[0].t(), p[1])),
    (
        "one zero for each group",
        XpuInt4W4A16(),
        "int4_weight_only",
        (64, 256),
        lambda p: (*p[:2], p[2].expand_as(p[1])),
    ),
    (
        "words along N",
        XpuInt4W4A16(),
        "int4_weight_only",
        (64, 256),
        lambda p: (p[0].t().contiguous().t(), *p[1:]),
    ),
    (
        "fp8 scales of blocks by rows",
        XpuFp8W8A16(),
        "fp8_per_block",
        (384, 640),
        lambda p: (p[0], p[1].t().contiguous()),
    ),
    (
        "fp8 scales by strides",
        XpuFp8W8A16(),
        "fp8_per_block",
        (256, 256),
        lambda p: (p[0], p[1].t().contiguous().t()),
    ),
    (
        "fp8 scales of W8A8 by rows",
        XpuFp8Gemm(),
        "fp8_per_block",
        (384, 640),
        lambda p: (p[0], p[1].t().contiguous()),
    ),
    (
        "row scales as a column",
        XpuScaledMM(),
        "fp8_per_channel",
        (64, 256),
        lambda p: (p[0], p[1].view(-1, 1)),
    ),
    ("int8 codes as bytes", XpuIntMM(), "int8", (64, 256), lambda p: (p[0].view(torch.uint8), p[1])),
]


@pytest.mark.parametrize(
    ("kernel", "scheme", "shape", "plant"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_a_planted_mistake_is_caught(kernel, scheme, shape, plant, monkeypatch):
    """Mistakes in packing: each makes the operator fail, or its result differ from the reference."""
    spec, pack = WeightSpec(BUILTIN[scheme], *shape), type(kernel).pack
    x = cases.activations(5, shape[1], torch.bfloat16)
    job = make_job(
        spec,
        numerics.quantize_weight(cases.plain(*shape), spec.scheme),
        x,
        None,
        kernel.quantizes_activations,
    )
    assert compare(kernel, [job], CPU) == ""
    planted = plant(pack(kernel, job.stored_weight, spec))
    monkeypatch.setattr(type(kernel), "pack", lambda self, stored_weight, spec: planted)
    assert caught(kernel, job)


def caught(kernel, job):
    try:
        return compare(kernel, [job], CPU) != ""
    except (AssertionError, RuntimeError, ValueError):  # of the operator
        return True


def test_operators_of_the_vendor_are_found_by_their_signature():
    assert vendor.features(torch.ops) == BMG.features
    assert vendor.features(SimpleNamespace()) == frozenset()
    expected = vendor.SCHEMAS["_xpu_C.fp8_gemm_w8a16"]
    parse = torch._C.parse_schema
    assert vendor.fits(
        parse("f(Tensor A, Tensor B, Tensor? B_scale_, Tensor? bias_, Tensor? out=None) -> Tensor"), expected
    )
    for other in (
        # that of Intel's archived extension
        "(Tensor A, Tensor B, bool trans_B, Tensor? B_scale_, Tensor? bias_) -> Tensor",
        "(Tensor A, Tensor B, Tensor? B_scale_) -> Tensor",
        "(Tensor A, Tensor B, Tensor? bias_, Tensor? B_scale_) -> Tensor",
        "(Tensor A, Tensor B, Tensor? B_scale_, Tensor? bias_, Tensor out) -> Tensor",
        "(Tensor A, Tensor B, Tensor B_scale_, Tensor? bias_) -> Tensor",
        "(Tensor A, Tensor B, Tensor? B_scale_, Tensor? bias_) -> Tensor[]",
    ):
        assert not vendor.fits(parse(f"f{other}"), expected), other


def test_a_package_that_does_not_load_is_named():
    def fails(name):
        raise ImportError("libsycl.so.9: cannot open shared object file\nand more")

    assert vendor.load(lambda name: None, fails) == ""
    assert vendor.load(lambda name: object(), lambda name: None) == ""
    assert (
        vendor.load(lambda name: object(), fails)
        == "ImportError: libsycl.so.9: cannot open shared object file"
    )


@pytest.mark.parametrize(
    ("found", "torch_version", "imported"),
    [
        ("2.10.10+xpu", "2.10.0+xpu", True),
        ("2.8.0+cpu", "2.8.0+xpu", False),
        ("2.10.10+xpu", "2.13.0+xpu", False),
        (None, "2.10.0", False),
    ],
)
def test_only_the_right_build_of_the_extension_is_imported(monkeypatch, found, torch_version, imported):
    """Importing any other ends the process (``os._exit``), or replaces operators of the CPU."""

    def version(name):
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    names = []
    monkeypatch.setattr(torch, "__version__", torch_version)
    vendor.load_extension(version, names.append)
    assert names == (["intel_extension_for_pytorch"] if imported else [])


def test_an_extension_that_does_not_load_is_as_none():
    def fails(name):
        raise OSError("libsycl.so.8: cannot open shared object file")

    vendor.load_extension(lambda name: torch.__version__.partition("+")[0] + "+xpu", fails)
    assert vendor.overload(torch.ops, "torch_ipex.no_such_operator.xpu") is None
