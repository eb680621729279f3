"""Finds Intel GPUs through torch. What is read is passed in, so that tests can pass fakes."""

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
    """The operators of ``vllm-xpu-kernels`` and Intel's extension; imports both where they are installed."""
    vendor.load()
    vendor.load_extension()
    return vendor.features(lib.ops)


def devices(lib: Any) -> tuple[Device, ...]:
    """Every GPU of ``lib``, the torch module. Raises what a failing driver raises.

    The features of a device are the operators of ``vllm-xpu-kernels`` and of Intel's extension that can be
    called.
    """
    if not hasattr(lib, "xpu") or not lib.xpu.is_available():
        return ()
    features = operators(lib)
    gpus = []
    for i in range(lib.xpu.device_count()):
        properties = lib.xpu.get_device_properties(i)
        arch = arch_of(properties.architecture, properties.has_subgroup_matrix_multiply_accumulate)
        gpus.append(Device(arch, i, properties.name, properties.total_memory, "xpu", features=features))
    return tuple(gpus)


class XpuBackend(Backend):
    """Intel GPUs."""

    kind = "xpu"
    torch_type = "xpu"
    archs: Mapping[str, Arch] = ARCHS
    products: Mapping[str, Arch] = PRODUCTS

    def detect(self) -> Sequence[Device]:
        """Every GPU that torch shows; none, at once, when torch is built without XPU."""
        return devices(torch)

    def memory(self, device: Device) -> int | None:
        """What the driver has left, and what torch holds of it without a tensor in it; as it was found, where
        no runtime answers.
        """
        lib = torch.xpu
        if not lib.is_available():
            return device.memory
        unused = lib.memory_reserved(device.index) - lib.memory_allocated(device.index)
        return int(lib.mem_get_info(device.index)[0] + unused)

    def kernels(self) -> Sequence[Kernel]:
        """XMX kernels first; the portable ones run everything else."""
        from quantport_xpu.kernels import kernels

        return kernels()

    def quantize_weight(self, weight: Tensor, scheme: Scheme) -> StoredWeight | None:
        """Quantizes by Triton; None where it has no backend for Intel GPUs or no kernel for the scheme, and
        for a weight on another device.
        """
        from quantport_xpu.kernels.triton import backend_reason

        if weight.device.type != self.torch_type or backend_reason():
            return None
        from quantport_triton.weights import quantize_weight

        return quantize_weight(weight, scheme)

    def advice(self) -> Sequence[str]:
        """What is missing to use a GPU: a driver, a torch for it, or what makes it fast."""
        from quantport_xpu.advice import advice

        return advice(torch)
