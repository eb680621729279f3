"""The suite of every room, with Intel GPUs on the CPU: what is accepted runs and is right, and what is refused fails.

ATen's operators are those of the CPU where it has them, the others are emulated (``xpu_operators.py``), and Triton's kernels run
in its interpreter.
"""

from __future__ import annotations

from typing import ClassVar

import pytest
import xpu_stand_in

from quantport.capability import Accepted
from quantport.testing import BackendConformance, Subject, cases
from quantport.testing.subject import alone
from quantport_xpu.detect import XpuBackend

ARCHS = ("bmg", "xe3p", "pvc")  # the others have the facts of one of these
FP32 = "no matrix engine multiplies fp32; Triton would, elsewhere"


class TestXpu(BackendConformance):
    kind = "xpu"
    stand_in = None
    # The interpreter runs one program of Triton's after another: tests/backends/triton takes more schemes, and up to 257 rows.
    stands_for: ClassVar = {"xpu.triton_weight_only": ("fp8_per_block", "int4_hqq", "mxfp4_dualscale")}
    rows = (1, 17)
    policy: ClassVar = {
        "converts e4m3fn": "the operator runs, and only loses time",
        "multiplies e4m3fn natively": "the native kernel runs the same operator",
        "no e4m3fn matrix instruction": "the emulation runs there, for who asks for it",
        **{f"triton_{family} takes activations of 16 bits": FP32 for family in ("int8", "int4_int8", "weight_only")},
        "int4_gemm_w4a8 takes activations of 16 bits": "it returns fp16, which is less than who has fp32 asks for",
        "multiple of 32, not 1": "one group is one scale for a row, which the emulation takes; the vendor's tests do not",
        "xpu.fp8_gemm needs N and K": "the emulation takes one block that is cut off along N; the vendor's tests do not",
        "is written for Xe-HPC": "the emulation holds no instruction of any GPU",
        "is tested by its vendor with N and K": "what it does with others is not known",
    }

    @pytest.fixture
    def subject(self, request, xpu_operators_registered, monkeypatch):
        """All three are found; the first, on which modules are, is one that takes the kernel."""
        devices = [xpu_stand_in.gpu(arch, i) for i, arch in enumerate(ARCHS)]
        with xpu_stand_in.found(devices):
            asked = request.node.callspec.params if hasattr(request.node, "callspec") else {}
            subject = Subject.installed(self.kind, self.policy, self.stand_in)
            if "kernel" in asked:
                devices.sort(key=lambda device: not takes(subject, device, asked["kernel"], asked["scheme"]))
                if hasattr(asked["kernel"], "family"):
                    monkeypatch.setattr(cases, "ROWS", self.rows)
            with xpu_stand_in.found(devices):
                yield subject

    def test_fakes(self, arch):
        """Of architectures that are not here: fake tensors of their own type."""
        super().test_fakes(Subject(alone(XpuBackend()), self.kind, self.policy, None), arch)


def takes(subject, device, kernel, scheme):
    requests = (r for dtype in cases.DTYPES for r in subject.requests(scheme, dtype, device))
    return any(isinstance(kernel.verdict(request), Accepted) for request in requests)
