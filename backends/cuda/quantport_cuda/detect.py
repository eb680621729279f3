"""Finds NVIDIA GPUs through torch. Every reader takes what it reads as an argument, so that tests
feed fakes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantport.backend import Arch, Backend, Device, Kernel, Scheme, StoredWeight
from quantport_cuda.capabilities import ARCHS, arch_of
from quantport_cuda.products import PRODUCTS
from quantport_triton import evidence
from quantport_triton.launch import target_of
from quantport_triton.weights import quantize_weight

# the first cublasLt with block scales for Blackwell, and the first with those of 128x128
_CUDA = (
    (12, 8),
    (12, 9),
)


def features(lib: Any) -> frozenset[str]:
    """What kernels ask about this build of torch: ``cuda>=12.8``, ``cuda>=12.9``, and ``mslk`` (its MXFP4
    kernels).
    """
    version = tuple(int(part) for part in lib.version.cuda.split(".")[:2])
    found = {f"cuda>={major}.{minor}" for major, minor in _CUDA if version >= (major, minor)}
    return frozenset(found | ({"mslk"} if "USE_MSLK" in lib.__config__.show() else set()))


def devices(lib: Any) -> tuple[Device, ...]:
    """Reads every GPU of ``lib`` (the torch module). A driver that fails raises here."""
    if lib.version.cuda is None or not lib.cuda.is_available():
        return ()
    found = []
    for i in range(lib.cuda.device_count()):
        arch = arch_of(*lib.cuda.get_device_capability(i))
        box = lib.cuda.get_device_properties(i)
        found.append(Device(arch, i, box.name, box.total_memory, "cuda", features=features(lib)))
    return tuple(found)


class CudaBackend(Backend):
    """NVIDIA GPUs."""

    kind = "cuda"
    torch_type = "cuda"
    archs: Mapping[str, Arch] = ARCHS
    products: Mapping[str, Arch] = PRODUCTS

    def detect(self) -> Sequence[Device]:
        """Every GPU that torch shows; none, at once, when torch is built without CUDA."""
        return devices(torch)

    def kernels(self) -> Sequence[Kernel]:
        """Tensor-core kernels first; the portable ones run everything else."""
        from quantport_cuda.kernels import kernels

        return kernels()

    def quantize_weight(self, weight: Tensor, scheme: Scheme) -> StoredWeight | None:
        """In one read of the weight, by Triton; None where that is missing or has no kernel for it, and for
        weights elsewhere.
        """
        if weight.device.type != self.torch_type:
            return None
        if evidence.refusals(self.kind, target_of(weight.device), "quantize", scheme.name):
            return None
        return quantize_weight(weight, scheme)

    def advice(self) -> Sequence[str]:
        """A GPU without a driver or a torch that can use it, or a torch without code for it, or without
        Triton.
        """
        from quantport_cuda.advice import advice

        return advice(torch)
