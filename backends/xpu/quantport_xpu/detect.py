"""Finds Intel GPUs through torch. Every reader takes what it reads as an argument, so that tests feed
fakes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantport.backend import Arch, Backend, Device, Kernel, Scheme, StoredWeight
from quantport_xpu import vendor
from quantport_xpu.capabilities import ARCHS, arch_of
from quantport_xpu.products import PRODUCTS


def operators(lib: Any) -> frozenset[str]:
    """The operators of ``vllm-xpu-kernels`` and of Intel's extension, which are imported where they are
    installed.
    """
    vendor.load()
    vendor.load_extension()
    return vendor.features(lib.ops)


def devices(lib: Any) -> tuple[Device, ...]:
    """Reads every GPU of ``lib`` (the torch module). A driver that fails raises here.

    The features of a device are the operators of ``vllm-xpu-kernels`` and of Intel's extension that can be
    called.
    """
    if not hasattr(lib, "xpu") or not lib.xpu.is_available():
        return ()
    features = operators(lib)
    found = []
    for i in range(lib.xpu.device_count()):
        box = lib.xpu.get_device_properties(i)
        arch = arch_of(box.architecture, box.has_subgroup_matrix_multiply_accumulate)
        found.append(Device(arch, i, box.name, box.total_memory, "xpu", features=features))
    return tuple(found)


class XpuBackend(Backend):
    """Intel GPUs."""

    kind = "xpu"
    torch_type = "xpu"
    archs: Mapping[str, Arch] = ARCHS
    products: Mapping[str, Arch] = PRODUCTS

    def detect(self) -> Sequence[Device]:
        """Every GPU that torch shows; none, at once, when torch is built without XPU."""
        return devices(torch)

    def kernels(self) -> Sequence[Kernel]:
        """XMX kernels first; the portable ones run everything else."""
        from quantport_xpu.kernels import kernels

        return kernels()

    def quantize_weight(self, weight: Tensor, scheme: Scheme) -> StoredWeight | None:
        """By Triton, where it has a backend for Intel GPUs and a kernel for the scheme; None else, and for
        weights elsewhere.
        """
        from quantport_xpu.kernels.triton import backend_reason

        if weight.device.type != self.torch_type or backend_reason():
            return None
        from quantport_triton.weights import quantize_weight

        return quantize_weight(weight, scheme)

    def advice(self) -> Sequence[str]:
        """A GPU without a torch that can use it, or without what makes it fast."""
        from quantport_xpu.advice import advice

        return advice(torch)
