"""Intel GPUs on the CPU: devices that are detected, whose tensors are on the CPU, and the operators that they
call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import numpy as np
import pytest
import torch
import triton_emulation
import xpu_operators
from exact_int_mm import exact_int_mm

from quantport.device import Device
from quantport.plugins.registry import default_registry
from quantport_xpu import vendor
from quantport_xpu.capabilities import ARCHS
from quantport_xpu.detect import XpuBackend

ARCHS_HERE = ("bmg", "xe3p", "pvc")  # the others have the facts of one of these


def gpu(arch: str, index: int = 0) -> Device:
    """A GPU as detection would return it, except that its tensors are on the CPU; it has every operator."""
    return Device(ARCHS[arch], index, ARCHS[arch].title, 8 << 30, "cpu", features=frozenset(vendor.SCHEMAS))


def scaled_mm(a, b, *args, product=torch._scaled_mm, **kwargs):
    """``_scaled_mm_out_xpu``: the operator of the CPU takes any sizes."""
    assert a.shape[1] % 16 == b.shape[1] % 16 == 0, "must be divisible by 16"
    return product(a, b, *args, **kwargs)


@contextmanager
def found(devices: Sequence[Device], quantizes: bool = True) -> Iterator[None]:
    """The process detects exactly these devices inside; torch has all operators, and Triton its interpreter
    as a backend.

    Without ``quantizes`` the reference quantizes weights, since the interpreter takes minutes for those of a
    model.
    """
    triton_emulation.install(pytest.importorskip("triton.runtime.interpreter"))
    room = XpuBackend()  # not a class of its own: the suite imports the room's class in a fresh process
    room.torch_type, room.detect = "cpu", lambda: devices
    lock, quantize = Lock(), room.quantize_weight

    def quantize_weight(weight, scheme):
        if not quantizes:
            return None
        with lock:  # loading asks from several threads, and the interpreter keeps one grid for all
            return quantize(weight, scheme)

    room.quantize_weight = quantize_weight
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(torch, "_scaled_mm", scaled_mm)
        patch.setattr("quantport_xpu.kernels.operators.registered", lambda name: True)
        patch.setattr("quantport_xpu.kernels.triton.backend_reason", lambda: "")
        patch.setitem(default_registry().backends, room.kind, room)
        patch.setitem(vars(default_registry()), "devices", tuple(devices))
        yield


class Emulated:
    """An operator of torch: a call emulates it, and its attributes are those of the real one."""

    def __init__(self, real, emulation):
        self.real, self.emulation = real, emulation

    def __call__(self, *args):
        return self.emulation(*args)

    def __getattr__(self, name):
        return getattr(self.real, name)


@contextmanager
def operators() -> Iterator[None]:
    """Registers the operators that the CPU lacks inside, with the vendors' schemas."""
    emulated = Emulated(torch.ops.aten._weight_int8pack_mm, xpu_operators.int8pack_mm)
    ours = torch.library.Library("aten", "IMPL")
    ours.impl("_weight_int4pack_mm_with_scales_and_zeros", xpu_operators.int4pack_mm, "CPU")
    libraries = {name: torch.library.Library(name, "FRAGMENT") for name in ("_xpu_C", "_C", "torch_ipex")}
    for name, schema in vendor.SCHEMAS.items():
        namespace, _, operator = name.partition(".")
        libraries[namespace].define(operator + schema)
        libraries[namespace].impl(operator, getattr(xpu_operators, operator.partition(".")[0]), "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.aten, "_weight_int8pack_mm", emulated)
        yield
    for library in (*libraries.values(), ours):
        library._destroy()


@contextmanager
def gpus() -> Iterator[None]:
    """One GPU of each kind with facts of its own is detected inside, with its operators: the setting of the
    conformance suite.
    """
    with exact_int_mm(), operators(), found([gpu(arch, i) for i, arch in enumerate(ARCHS_HERE)]):
        yield
