"""What is launched on Intel GPUs, traced with fake tensors, against what Triton's backend for them takes.

From intel/intel-xpu-backend-for-triton third_party/intel/backend/compiler.py at 003e001efe16: a dot of int8
needs N of at least a subgroup (16; 8 on Arc A) and K of 32; a smaller one of 16-bit operands does not use the
matrix engines; fp8 operands of a dot are converted.
"""

from __future__ import annotations

import pytest
import torch

from quantport.backend import WeightSpec
from quantport.plugins.registry import default_registry
from quantport.testing.fakes import fake_tensors
from quantport_triton.launch import target_of, traced
from quantport_triton.tuned import entries
from quantport_xpu.capabilities import ARCHS

FAMILIES = ("weight_only", "int8", "int4_int8", "quantize")
KERNELS = [k for k in default_registry().kernels("xpu") if hasattr(k, "family")]
CASES = [(k, s) for k in KERNELS for s in default_registry().schemes.values() if k.serves(s)]


def launches(kernel, scheme, arch, rows):
    spec = WeightSpec(scheme, 256, 512)
    with fake_tensors(), traced(arch) as found:
        stored = {
            name: torch.empty(shape, dtype=t, device="xpu")
            for name, (shape, t) in scheme.layout(spec.n, spec.k).items()
        }
        kernel.run(
            torch.empty(rows, spec.k, dtype=torch.bfloat16, device="xpu"),
            kernel.pack(stored, spec),
            None,
            spec,
        )
    return found


@pytest.mark.parametrize(("kernel", "scheme"), CASES, ids=[f"{k.family}-{s.name}" for k, s in CASES])
def test_what_is_launched_fits_the_matrix_engines(kernel, scheme):
    for rows in (1, 2, 16, 17, 300):
        found = launches(kernel, scheme, "bmg", rows)
        assert found
        for launch in found:
            constants = dict(launch.constants)
            # codes are decoded in registers
            assert not any("fp8" in kind for _, kind in launch.types), launch.name
            assert launch.warps in (1, 2, 4, 8, 16, 32)
            if launch.kernel.__name__ == "gemm":
                depth = (
                    constants["BW"] * constants["BYTES"] * 8 // constants["BITS"]
                    if "BW" in constants
                    else constants["BK"]
                )
                assert min(constants["BM"], constants["BN"]) >= 16, launch.name
                assert depth >= 32, launch.name


@pytest.mark.parametrize("family", FAMILIES)
def test_no_architecture_has_configurations_of_its_own(family):
    """Nothing is measured there: all take ``default.json``, and a real GPU is named by its type alone."""
    assert target_of(torch.device("xpu", 0)) == "xpu"
    for arch in ("xpu", *ARCHS):
        assert entries(arch, family) == entries("default", family)


def test_results_that_are_bytes_are_compiled_without_fused_multiplications():
    """Those of ``quantize``, whose codes equal the reference; the backend heeds ``enable_fp_fusion``."""
    kernel = next(k for k in KERNELS if k.family == "int8")
    found = [
        launch
        for launch in launches(kernel, default_registry().schemes["int8"], "bmg", 16)
        if "quantize" in launch.kernel.fn.__module__
    ]
    assert found
    assert not any(launch.fusion for launch in found)
