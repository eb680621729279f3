"""Operators of Intel GPUs on the CPU, for the tests that ask for them."""

from __future__ import annotations

import pytest
import torch
import xpu_operators

from quantport_xpu import vendor


class Emulated:
    """An operator of torch's own: a call emulates it, whoever looks at it sees the real one."""

    def __init__(self, real, emulation):
        self.real, self.emulation = real, emulation

    def __call__(self, *args):
        return self.emulation(*args)

    def __getattr__(self, name):
        return getattr(self.real, name)


@pytest.fixture
def xpu_operators_registered(monkeypatch):
    """The operators that the CPU lacks, registered for it, with the vendors' schemas."""
    emulated = Emulated(torch.ops.aten._weight_int8pack_mm, xpu_operators.int8pack_mm)
    monkeypatch.setattr(torch.ops.aten, "_weight_int8pack_mm", emulated)
    ours = torch.library.Library("aten", "IMPL")
    ours.impl("_weight_int4pack_mm_with_scales_and_zeros", xpu_operators.int4pack_mm, "CPU")
    libraries = {name: torch.library.Library(name, "FRAGMENT") for name in ("_xpu_C", "_C", "torch_ipex")}
    for name, schema in vendor.SCHEMAS.items():
        namespace, _, operator = name.partition(".")
        libraries[namespace].define(operator + schema)
        libraries[namespace].impl(operator, getattr(xpu_operators, operator.partition(".")[0]), "CPU")
    yield
    for library in (*libraries.values(), ours):
        library._destroy()
