"""Both example models on fake XPU tensors: planned, bound to the planned kernels, and run as on the GPU,
without values.

The quantized matrix products that run are recorded, and called as torch's own registry or the vendors'
schemas say.
"""

from __future__ import annotations

from dataclasses import replace

import fake_models as shared
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quantport.modules import QuantExperts
from quantport.plugins.registry import default_registry
from quantport_xpu import vendor

# Architecture, scheme, the kernels of the layers, and the matrix product that they call; None for launches of
# Triton alone.
ASKED = [
    ("pvc", "int8", "xpu._int_mm", "_int_mm"),
    ("arc_a", "int8_weight_only", "xpu._weight_int8pack_mm", "_weight_int8pack_mm"),
    (
        "bmg",
        "int4_weight_only",
        "xpu._weight_int4pack_mm xpu.triton_weight_only",
        "_weight_int4pack_mm_with_scales_and_zeros",
    ),
    ("lnl", "int4_weight_only_g32", "xpu._weight_int4pack_mm", "_weight_int4pack_mm_with_scales_and_zeros"),
    ("bmg", "fp8_per_channel", "xpu.triton_weight_only", None),
    ("ptl", "fp8_per_block", "xpu.triton_weight_only", None),
    ("xe3p", "fp8_per_tensor", "xpu._scaled_mm", "_scaled_mm"),
    ("xe3p", "fp8_per_channel", "xpu._scaled_mm", "_scaled_mm"),
    ("bmg", "int4_w4a8", "xpu.triton_int4_int8", None),
    ("bmg", "int4_mse", "xpu.triton_weight_only", None),
    ("pvc", "mxfp4", "xpu.triton_weight_only", None),
    ("bmg", "nf4", "xpu.triton_weight_only", None),
    ("bmg", "q4_k", "torch.dequantize", None),
]
# The same with the operators of the vendor's packages, whose shapes and dtypes are those of their sources.
VENDOR = [
    ("bmg", "fp8_per_channel", "weight_only", "xpu.fp8_gemm_w8a16", "fp8_gemm_w8a16"),
    ("xe3p", "fp8_per_block", "weight_only", "xpu.fp8_gemm", "fp8_gemm"),
    ("bmg", "int4_w4a8", "weight_only", "xpu.int4_gemm_w4a8", "int4_gemm_w4a8"),
    ("bmg", "mxfp8", "reference", "xpu.fp8_gemm_mx", "fp8_gemm"),
    ("pvc", "mxfp4", "reference", "xpu.fp4_gemm", "fp4_gemm"),
    ("pvc", "mxfp4:rceil", "reference", "xpu.fp4_gemm_quantized", "fp4_gemm per_token_group_quant_mxfp4"),
    ("pvc", "mxfp4", "weight_only", "xpu.mm_mxfp4_marlin", "mm_mxfp4_out_marlin"),
]
FAKES = {
    "_xpu_C.fp8_gemm": lambda a, b, dtype, *rest: a.new_empty(len(a), b.shape[1], dtype=dtype),
    "_xpu_C.fp8_gemm_w8a16": lambda a, b, *rest: a.new_empty(len(a), b.shape[1]),
    "_xpu_C.fp4_gemm": lambda a, b, a_scale, b_scale, dtype, bias: a.new_empty(
        len(a), b.shape[1], dtype=dtype
    ),
    "_xpu_C.int4_gemm_w4a16": lambda a, b, *rest: a.new_empty(len(a), b.shape[1]),
    "_xpu_C.int4_gemm_w4a8": lambda a, scale, zero, b, *rest: a.new_empty(
        len(a), b.shape[1], dtype=torch.float16
    ),
    "_C.per_token_group_quant_mxfp4": lambda *given: None,
    "torch_ipex.mm_mxfp4_out_marlin.xpu": lambda *given: None,
}
PRODUCTS = {"_int_mm", "_weight_int8pack_mm", "_weight_int4pack_mm_with_scales_and_zeros", "_scaled_mm"}


@pytest.fixture
def _vendor():
    """Operators with the vendors' schemas that return empty results."""
    libraries = {name: torch.library.Library(name, "FRAGMENT") for name in ("_xpu_C", "_C", "torch_ipex")}
    for name, fake in FAKES.items():
        namespace, _, operator = name.partition(".")
        libraries[namespace].define(operator + vendor.SCHEMAS[name])
        libraries[namespace]._register_fake(operator, fake)
    yield
    for library in libraries.values():
        library._destroy()


class Products(TorchDispatchMode):
    """Records the quantized matrix products, and checks their keywords against torch's own registry."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if func.namespace in ("_xpu_C", "_C", "torch_ipex"):
            self.seen.add(name)
        elif name in PRODUCTS:
            known = [a.name for a in getattr(torch.ops.aten, name).default._schema.arguments]
            assert len(args) <= len(known)
            assert set(kwargs or {}) <= set(known[len(args) :])
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "directory", [shared.DENSE, pytest.param(shared.MOE, marks=pytest.mark.slow)], ids=lambda path: path.name
)
@pytest.mark.parametrize(("arch", "scheme", "names", "product"), ASKED)
def test_every_layer_runs_its_kernel(directory, arch, scheme, names, product, monkeypatch):
    monkeypatch.setattr(QuantExperts, "forward", shared.as_compiled)
    with Products() as products:
        modules, launches = shared.check_model(directory, f"xpu:{arch}", scheme)
    kernels = shared.kernels_of(modules)
    # K of some layers is no multiple of a group of 128
    assert {k.name for k in kernels} == set(names.split())
    assert products.seen == ({product} if product else set())
    own = {shared.OPS[k.family] for k in kernels if hasattr(k, "family")}
    assert shared.files(launches) == own | ({"quantize"} if own and scheme == "int4_w4a8" else set())


@pytest.mark.usefixtures("_vendor")
@pytest.mark.parametrize(
    "directory", [shared.DENSE, pytest.param(shared.MOE, marks=pytest.mark.slow)], ids=lambda path: path.name
)
@pytest.mark.parametrize(("arch", "scheme", "fallback", "name", "products"), VENDOR)
def test_every_layer_runs_the_operators_of_the_vendor(
    directory, arch, scheme, fallback, name, products, monkeypatch
):
    monkeypatch.setattr(QuantExperts, "forward", shared.as_compiled)
    device = replace(default_registry().device(f"xpu:{arch}"), features=frozenset(vendor.SCHEMAS))
    with Products() as seen:
        modules, _ = shared.check_model(directory, device, scheme, fallback)
    names = {k.name for k in shared.kernels_of(modules)}
    # K of some layers fits no group
    assert {other for other in names if not other.startswith("xpu.triton_")} == {name}
    assert seen.seen == set(products.split())
