"""Both example models on fake XPU tensors: planned, bound to the planned kernels, and run as on the GPU, but for the numbers.

The quantized matrix products that run are noted, and called as torch's own registry says.
"""

from __future__ import annotations

import fake_models as shared
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quantport.modules import QuantExperts

# Architecture, scheme, the kernels of the layers, and the matrix product that they call; None for launches of Triton alone.
ASKED = [
    ("pvc", "int8", "xpu._int_mm", "_int_mm"),
    ("arc_a", "int8_weight_only", "xpu._weight_int8pack_mm", "_weight_int8pack_mm"),
    ("bmg", "int4_weight_only", "xpu._weight_int4pack_mm xpu.triton_weight_only", "_weight_int4pack_mm_with_scales_and_zeros"),
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
]  # fmt: skip
PRODUCTS = {"_int_mm", "_weight_int8pack_mm", "_weight_int4pack_mm_with_scales_and_zeros", "_scaled_mm"}


class Products(TorchDispatchMode):
    """Notes the quantized matrix products, and checks their keywords against torch's own registry."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if name in PRODUCTS:
            known = [a.name for a in getattr(torch.ops.aten, name).default._schema.arguments]
            assert len(args) <= len(known)
            assert set(kwargs or {}) <= set(known[len(args) :])
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("directory", [shared.DENSE, shared.MOE], ids=lambda path: path.name)
@pytest.mark.parametrize(("arch", "scheme", "names", "product"), ASKED)
def test_every_layer_runs_its_kernel(directory, arch, scheme, names, product, monkeypatch):
    monkeypatch.setattr(QuantExperts, "forward", shared.as_compiled)
    with Products() as products:
        modules, launches = shared.check_model(directory, f"xpu:{arch}", scheme)
    kernels = shared.kernels_of(modules)
    assert {k.name for k in kernels} == set(names.split())  # K of some layers is no multiple of a group of 128
    assert products.seen == ({product} if product else set())
    own = {shared.OPS[k.family] for k in kernels if hasattr(k, "family")}
    assert shared.files(launches) == own | ({"quantize"} if own and scheme == "int4_w4a8" else set())
