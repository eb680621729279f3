"""vLLM-Omni's online table on Intel GPUs, what it marks as working and what it does not verify, for LLMs and
diffusion transformers.
"""

from __future__ import annotations

from dataclasses import replace

import fake_models as shared
import omni
import pytest
import torch
import xpu_stand_in
from torch.utils._pytree import tree_map_only

from quantport import plan, quantize_
from quantport.kernels import aten
from quantport.kernels.verdict import Evidence, Status
from quantport.plugins.registry import default_registry

DEVICES = ("xpu:bmg", "xpu:pvc")
# Column of the table -> schemes, and what they come to here: the matrix engines multiply int8, and no FP8,
# MXFP8 or MXFP4.
COLUMNS = {
    "fp8": (
        ("fp8_per_tensor", "fp8_per_channel", "fp8_per_block"),
        Status.WEIGHT_ONLY,
        "W8A16",
        "xpu.triton_weight_only",
    ),
    "int8": (("int8",), Status.NATIVE, "W8A8", "xpu._int_mm"),
    "mxfp8": (("mxfp8",), Status.WEIGHT_ONLY, "W8A16", "xpu.triton_weight_only"),
    "mxfp4": (("mxfp4",), Status.WEIGHT_ONLY, "W4A16", "xpu.triton_weight_only"),
}
RUN = [
    ("dit", "fp8_per_channel"),
    ("dit", "mxfp4"),
    ("dit", "int8"),
    ("dit", "mxfp8"),
    *(
        pytest.param(m, s, marks=pytest.mark.slow)
        for m in omni.FACTORIES
        if m != "dit"
        for s in ("int8", "mxfp8")
    ),
]
CASES = [(column, scheme, *rest) for column, (schemes, *rest) in COLUMNS.items() for scheme in schemes]


def test_every_column_is_asked_for():
    assert COLUMNS.keys() == omni.TABLE["xpu"].keys()
    assert False not in omni.TABLE["xpu"].values()  # nothing that the table rules out is left to exceed


def planned(model, device, scheme):
    """The plan of a language model, by its checkpoint, or of a diffusion transformer, by its name in
    ``omni``.
    """
    return plan(omni.build(model) if isinstance(model, str) else model, scheme, device=device)


def models():
    return [pytest.param(shared.DENSE, id="llama"), pytest.param(shared.MOE, id="qwen3-moe"), *omni.FACTORIES]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", models())
@pytest.mark.parametrize(("column", "scheme", "status", "precision", "kernel"), CASES)
def test_every_layer_is_quantized_by_a_fused_kernel(column, scheme, status, precision, kernel, model, device):
    if model in omni.DIFFUSERS:
        pytest.importorskip("diffusers")
    steps = planned(model, device, scheme).quantized
    assert steps
    for step in steps:
        found = (step.choice.kernel, step.choice.status, step.choice.precision)
        assert found == (kernel, status, precision), step.layer.name
        assert step.choice.claim.evidence in (Evidence.INTERPRETED, Evidence.DECLARED)
        if status is Status.WEIGHT_ONLY:
            assert any("matrix instruction" in reason for reason in step.choice.reasons), step.layer.name


@pytest.mark.parametrize(("column", "scheme", "status", "precision", "kernel"), CASES)
def test_a_diffusion_transformer_runs_on_a_fake_gpu(column, scheme, status, precision, kernel):
    """One denoising step, every layer by its planned kernel; the language models are in
    test_fake_models.py.
    """
    whole, given, met = omni.build("dit"), omni.given("dit"), []
    expected = omni.step(whole, given).shape
    with shared.on_fake_gpu("bmg") as launches:
        modules = shared.bind(whole, plan(whole, scheme, device="xpu:bmg"))
        for module in modules.values():
            module.register_forward_hook(lambda module, args, y: met.append(module))
        y = omni.step(whole, tree_map_only(torch.Tensor, lambda t: shared.fake(t, "xpu"), given))
    assert (y.shape, y.dtype, y.device.type) == (expected, torch.bfloat16, "xpu")
    assert {id(module) for module in modules.values()} == {id(module) for module in met}
    assert {module.kernel.name for module in modules.values()} == {kernel}
    assert shared.files(launches) == ({"weight_only"} if "triton" in kernel else set())


@pytest.mark.parametrize(("model", "scheme"), RUN)
def test_a_diffusion_transformer_computes_what_its_scheme_says(scheme, model, monkeypatch):
    """On the CPU in place of the GPU: the planned kernels, and in a second run the portable ones."""
    if model in omni.DIFFUSERS:
        pytest.importorskip("diffusers")
    with xpu_stand_in.found([replace(xpu_stand_in.gpu("bmg"), features=frozenset())], quantizes=False):
        fused, portable = omni.build(model), omni.build(model)
        made = quantize_(fused, scheme, fallback="error" if scheme == "int8" else None)
        monkeypatch.setitem(vars(default_registry())["_kernels"], "xpu", aten.portable())
        quantize_(portable, scheme, fallback="reference" if scheme == "int8" else None)
        y, expected = (omni.step(m, omni.given(model)).float() for m in (fused, portable))
    assert not any(step.choice.kernel.startswith("torch.") for step in made.quantized)
    assert {step.choice.kernel for step in portable.quantport_plan.quantized} <= {
        "torch.dequantize",
        "torch.reference",
    }
    assert ((y - expected).norm() / expected.norm()).item() < 2**-6
