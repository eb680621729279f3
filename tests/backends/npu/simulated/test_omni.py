"""What vLLM-Omni's table lists for Ascend runs by native kernels: diffusion transformers here, language
models with the same schemes in ``test_models.py``.
"""

from simulator.need import simulated

simulated("A2", "950")

import declared
import omni
import pytest
import torch
from simulator import register
from torch import nn

import quantport
from quantport.kernels.verdict import Status
from quantport.model.roles import SkipCode
from quantport.plugins.registry import default_registry

ROW = omni.TABLE["npu"]
# MX and FP8 need the cube unit of the 950; FP8 is no promise of the table
OF_FAMILY = {
    "A2": ("int8",),
    "950": tuple(ROW),
}
HERE = OF_FAMILY[register.family()]
TOLERANCE = 2.0**-6  # of every kernel of the room


def quantized(name, scheme, where):
    """A model whose linear layers are all quantized in place, but for those that its class keeps in FP32, and
    the plan.
    """
    model = omni.build(name).to(where)
    linear = {key for key, m in model.named_modules() if isinstance(m, nn.Linear)}
    plan = quantport.quantize_(model, scheme, fallback="reference" if where == "cpu" else "error")
    kept = {step.layer.name for step in plan.steps if step.layer.skipped_as(SkipCode.KEPT_FP32)}
    assert set(declared.modules(model)) == linear - kept
    return model, plan


def test_what_the_table_promises_runs_somewhere():
    assert {scheme for scheme, mark in ROW.items() if mark is omni.YES} <= {
        s for schemes in OF_FAMILY.values() for s in schemes
    }


def host_norm(x, gamma, epsilon):
    """``torch_npu.npu_rms_norm`` on the host: diffusers calls it for every tensor where torch_npu is
    installed.
    """
    return (nn.functional.rms_norm(x.float(), gamma.shape, gamma.float(), epsilon).to(x.dtype),)


@pytest.mark.parametrize("scheme", HERE)
@pytest.mark.parametrize("name", omni.FACTORIES)
def test_a_diffusion_transformer_runs_natively(name, scheme, monkeypatch):
    """One denoising step: every linear layer runs by a native kernel, and each product and the result are
    within the kernel's tolerance.
    """
    model, plan = quantized(name, scheme, "npu")
    assert {step.choice.status for step in plan.quantized} == {Status.NATIVE}
    assert all(step.choice.kernel.startswith("npu.") for step in plan.quantized)
    assert {step.choice.precision for step in plan.quantized} == {
        default_registry().schemes[scheme].precision
    }
    reference, _ = quantized(name, scheme, "cpu")
    declared.as_declared(reference, model)
    register.CALLS.clear()
    said = omni.step(model, omni.given(name, "npu")).float().cpu()
    assert register.CALLS.count("npu_quant_matmul") == len(plan.quantized)
    checked = declared.check_each(model)
    omni.step(model, omni.given(name, "npu"))
    assert all(kernel.errors and max(kernel.errors) <= kernel.kernel.tolerance for kernel in checked)
    monkeypatch.setattr("torch_npu.npu_rms_norm", host_norm)
    wanted = omni.step(reference, omni.given(name)).float()
    assert torch.isfinite(wanted).all()
    assert (said - wanted).norm() <= TOLERANCE * wanted.norm()
