"""The conformance suite of every room, with Intel GPUs on the CPU: what is accepted runs and is right, and
what is refused fails.

ATen's operators are those of the CPU where it has them, the others are emulated (``xpu_operators.py``), and
Triton's kernels run in its interpreter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import xpu_stand_in

from quantport.testing import BackendConformance, Subject
from quantport.testing.subject import alone
from quantport_xpu.detect import XpuBackend


class TestXpu(BackendConformance):
    kind = "xpu"
    stand_in = None
    setting = "xpu_stand_in:gpus"
    # The interpreter runs one program of Triton's after another: tests/backends/triton takes more schemes,
    # and up to 257 rows.
    stands_for: ClassVar = {"xpu.triton_weight_only": ("fp8_per_block", "int4_hqq", "mxfp4_dualscale")}
    rows = (1, 17)

    @pytest.fixture
    def subject(self, request):
        """Few rows for kernels that run on Triton."""
        asked = request.node.callspec.params if hasattr(request.node, "callspec") else {}
        with xpu_stand_in.gpus():
            found = Subject.installed(self.kind, self.stand_in, self.limit)
            yield replace(found, rows=self.rows) if hasattr(asked.get("kernel"), "family") else found

    def test_fakes(self, subject, arch):
        """For architectures that are not here: fake tensors of their own device type."""
        super().test_fakes(replace(subject, registry=alone(XpuBackend())), arch)
