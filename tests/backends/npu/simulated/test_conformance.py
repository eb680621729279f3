"""The conformance suite of every room on a simulated NPU: what is accepted runs and is right, and what is
refused fails.

A kernel that declares a deviation is compared with the reference of the scheme with that deviation
(``declared.py``).
"""

from simulator.need import simulated

simulated()

from types import SimpleNamespace

import declared
import pytest
import torch
from simulator import register

from quantport import numerics
from quantport.testing import BackendConformance, builders, check_grouped, check_runs

# torch_npu copies and pickles tensors by way of the old storages, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")

TILED = ("npu.quant_matmul", "npu.dual_level_quant_matmul")


@pytest.fixture
def by_declaration(kernel, monkeypatch, request):
    """Replaces the reference by that of the kernel."""
    linear = declared.DECLARED.get(kernel.name)
    if linear is None:
        yield
        return

    experts = request.node.callspec.params.get("layer") == "moe"
    # SwiGLU in the launch: fp32 in between
    exact = experts and register.family() == register.A5 and hasattr(kernel, "fits_fused")

    def told(x, stored_weight, scheme, bias=None):
        return linear(x, stored_weight, scheme, bias, torch.float32 if exact else x.dtype)

    for module in (builders, check_grouped, check_runs):
        monkeypatch.setattr(
            module, "numerics", SimpleNamespace(quantize_weight=numerics.quantize_weight, linear=told)
        )
    check_runs._plain.cache_clear()
    yield
    check_runs._plain.cache_clear()


class TestSimulatedNpu(BackendConformance):
    kind = "npu"
    every_kernel = True
    setting = "simulator.need:running"

    @pytest.mark.usefixtures("by_declaration")
    def test_accepted_runs(self, subject, kernel, scheme, dtype):
        super().test_accepted_runs(subject, kernel, scheme, dtype)

    @pytest.mark.usefixtures("by_declaration")
    def test_special_weights(self, subject, kernel, scheme, dtype):
        super().test_special_weights(subject, kernel, scheme, dtype)

    @pytest.mark.usefixtures("by_declaration")
    def test_forward(self, subject, kernel, scheme, layer):
        super().test_forward(subject, kernel, scheme, layer)

    @pytest.mark.usefixtures("by_declaration")
    def test_grouped(self, subject, kernel, scheme, experts):
        super().test_grouped(subject, kernel, scheme, experts)

    def test_opcheck(self, subject, kernel, scheme, layer, traced):
        if kernel.name in TILED:
            pytest.skip(
                "opcheck compares elements one by one, and here they lie in tiles (FRACTAL_NZ); "
                "test_compile runs it"
            )
        super().test_opcheck(subject, kernel, scheme, layer, traced)

    def test_inductor(self, subject):
        pytest.skip(
            "torch_npu's Inductor generates code with triton-ascend, whose compiler is part of "
            "CANN; aot_eager is tried"
        )
