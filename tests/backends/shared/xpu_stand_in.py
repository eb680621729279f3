"""Intel GPUs on the CPU: devices that count as found, whose tensors are the CPU's. ``xpu_operators`` are what they call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import numpy as np
import pytest
import torch
import triton_emulation

from quantport.device import Device
from quantport.host import host
from quantport_xpu import vendor
from quantport_xpu.capabilities import ARCHS
from quantport_xpu.detect import XpuBackend


def gpu(arch: str, index: int = 0) -> Device:
    """A GPU as detection would find it, but for the place of its tensors; it has every operator."""
    return Device(ARCHS[arch], index, ARCHS[arch].title, 8 << 30, "cpu", features=frozenset(vendor.SCHEMAS))


def scaled_mm(a, b, *args, product=torch._scaled_mm, **kwargs):
    """``_scaled_mm_out_xpu``: the operator of the CPU takes any sizes."""
    assert a.shape[1] % 16 == b.shape[1] % 16 == 0, "must be divisible by 16"
    return product(a, b, *args, **kwargs)


@contextmanager
def found(devices: Sequence[Device], quantizes: bool = True) -> Iterator[None]:
    """Inside, the process finds these devices and no other; torch has all operators, and Triton a backend: its interpreter.

    Without ``quantizes`` the reference quantizes weights: the interpreter takes minutes for those of a model.
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
        patch.setitem(host().backends, room.kind, room)
        patch.setitem(vars(host()), "devices", tuple(devices))
        yield
