"""What the NPU room claims and refuses, for hardware that is not here."""

from __future__ import annotations

import pytest
import torch

from quantport.backend import Accepted, Evidence, Request, Status, WeightSpec
from quantport.host import Host
from quantport_npu.capabilities import ARCHS

HOST = Host(only=["npu"])
W8A8 = ("fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "int8")
WEIGHT_ONLY = ("fp8_weight_only", "int8_weight_only", "int4_weight_only")
FORMATS = {
    "ascend310p": ("310P", "fp16 int8"),
    "ascend910b": ("A2", "fp16 bf16 int8 int4"),
    "ascend910c": ("A3", "fp16 bf16 int8 int4"),
    "ascend950": ("A5", "fp16 bf16 int8 int4 e4m3fn e5m2 mxfp8 mxfp4"),
}


@pytest.mark.parametrize("name", ARCHS)
def test_facts(name):
    arch = ARCHS[name]
    assert (arch.family, arch.native) == (FORMATS[name][0], set(FORMATS[name][1].split()))
    assert (arch.kind, arch.name) == ("npu", name)
    assert arch.source
    assert arch.title
    assert arch.compute is (torch.float16 if name == "ascend310p" else torch.bfloat16)


@pytest.mark.parametrize("scheme", [*W8A8, *WEIGHT_ONLY])
@pytest.mark.parametrize("name", ARCHS)
def test_everything_runs_portably_and_nothing_is_called_native(name, scheme):
    device = HOST.device(f"npu:{name}")
    request = Request(WeightSpec(HOST.schemes[scheme], 64, 256), "linear", device, device.arch.compute)
    found = {v.kernel: v for v in (kernel.verdict(request) for kernel in HOST.kernels("npu")) if isinstance(v, Accepted)}
    assert set(found) == {"torch.dequantize", "torch.reference"}
    assert found["torch.dequantize"].status is (Status.WEIGHT_ONLY if scheme in W8A8 else Status.DEQUANTIZE)
    assert found["torch.reference"].status is Status.REFERENCE
    assert all(v.claim.evidence is Evidence.DECLARED for v in found.values())
