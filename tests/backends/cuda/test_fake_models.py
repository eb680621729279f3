"""Both example models on fake CUDA tensors: planned, bound to the planned kernels, and run as on the GPU,
without values.
"""

from __future__ import annotations

import fake_models as shared
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from quantport.modules import QuantExperts

ASKED = [
    ("sm_75", "fp8_per_channel"),
    ("sm_75", "int4_weight_only"),
    ("sm_80", "fp8_per_tensor"),
    ("sm_80", "int8"),
    ("sm_80", "int4_mse"),
    ("sm_80", "nf4"),
    ("sm_80", "q4_k"),
    ("sm_90", "fp8_per_tensor"),
    ("sm_90", "fp8_per_block"),
    ("sm_90", "int4_weight_only_g32"),
    ("sm_90", "mxfp4"),
    ("sm_100", "fp8_per_channel"),
    ("sm_100", "mxfp8"),
    ("sm_100", "nvfp4"),
    ("sm_100", "int4_w4a8"),
    ("sm_100", "mxfp4_dualscale"),
]


IN_EXPERTS = ("fp8_per_block", "int4_weight_only_g32", "nvfp4", "int8")  # the others are nightly


@pytest.mark.parametrize(
    ("directory", "arch", "scheme"),
    [
        pytest.param(
            directory,
            *asked,
            marks=() if directory is shared.DENSE or asked[1] in IN_EXPERTS else pytest.mark.slow,
            id="-".join((directory.name, *asked)),
        )
        for directory in (shared.DENSE, shared.MOE)
        for asked in ASKED
    ],
)
def test_every_layer_runs_its_kernel(directory, arch, scheme, monkeypatch):
    monkeypatch.setattr(QuantExperts, "forward", shared.as_compiled)
    modules, launches = shared.check_model(directory, f"cuda:{arch}", scheme)
    kernels = shared.kernels_of(modules)
    own = {shared.OPS[kernel.family] for kernel in kernels if hasattr(kernel, "family")}
    # by Triton, for torch's kernels too
    quantized = {"quantize" for kernel in kernels if kernel.quantizes_activations}
    assert shared.files(launches) == own | quantized


def test_launches_are_those_of_the_architecture():
    """The launches for one row, for a prompt, and where Triton has no matrix unit."""
    found = {}
    for arch in ("sm_75", "sm_80"):
        model, plan = shared.planned(shared.DENSE, f"cuda:{arch}", "int4_weight_only")
        with shared.on_fake_gpu(arch) as launches:
            shared.bind(model, plan)
            found[arch] = []
            for _ in shared.answers(model, plan.device.arch.compute, "cuda"):
                found[arch].append({launch.kernel.__name__ for launch in launches})
                launches.clear()
    assert found == {"sm_75": [{"dequantize"}, {"gemv"}], "sm_80": [{"gemm"}, {"gemv"}]}


def test_experts_of_a_kernel_that_loops_wait_for_the_gpu():
    model, plan = shared.planned(shared.MOE, "cuda:sm_80", "int4_weight_only")
    with shared.on_fake_gpu("sm_80"):
        shared.bind(model, plan)
        with pytest.raises(DataDependentOutputException):
            list(shared.answers(model, torch.bfloat16, "cuda"))


@pytest.mark.parametrize(
    ("wait", "error"),
    [
        (lambda x: x.amax().item(), DataDependentOutputException),
        (lambda x: x.amax(1).tolist(), DataDependentOutputException),
        (lambda x: bool((x > 0).any()), DataDependentOutputException),
        (lambda x: torch.ops.aten.nonzero(x), DynamicOutputShapeException),
        (lambda x: x.cpu(), shared.WaitError),
        (lambda x: x.copy_(torch.zeros(x.shape)), shared.WaitError),
    ],
)
def test_a_kernel_that_waits_would_be_found(wait, error, monkeypatch):
    model, plan = shared.planned(shared.DENSE, "cuda:sm_90", "fp8_per_channel")
    with shared.on_fake_gpu("sm_90"):
        kernel = next(iter(shared.bind(model, plan).values())).kernel
        run = type(kernel).run
        monkeypatch.setattr(type(kernel), "run", lambda self, x, *rest: (wait(x), run(self, x, *rest))[1])
        with pytest.raises(error):
            list(shared.answers(model, torch.bfloat16, "cuda"))
