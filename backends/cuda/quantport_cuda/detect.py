"""Finds NVIDIA GPUs through torch. What is read is passed in, so that tests can pass fakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantport.backend import Arch, Backend, Device, Kernel, Scheme, StoredWeight
from quantport_cuda.capabilities import ARCHS, arch_of
from quantport_cuda.products import PRODUCTS
from quantport_triton import available, evidence, version
from quantport_triton.launch import target_of
from quantport_triton.weights import quantize_weight

# The first CUDA whose cublasLt has block scales for Blackwell, and the first with those of 128x128.
_CUDA = ((12, 8), (12, 9))


def features(lib: Any) -> frozenset[str]:
    """What kernels need to know of this build of torch: ``cuda>=12.8``, ``cuda>=12.9``, and ``mslk``, which
    has kernels for MXFP4.
    """
    version = tuple(int(part) for part in lib.version.cuda.split(".")[:2])
    cuda = {f"cuda>={major}.{minor}" for major, minor in _CUDA if version >= (major, minor)}
    return frozenset(cuda | ({"mslk"} if "USE_MSLK" in lib.__config__.show() else set()))


def devices(lib: Any) -> tuple[Device, ...]:
    """Every GPU of ``lib``, the torch module. Raises what a failing driver raises."""
    if lib.version.cuda is None or not lib.cuda.is_available():
        return ()
    gpus = []
    for i in range(lib.cuda.device_count()):
        arch = arch_of(*lib.cuda.get_device_capability(i))
        properties = lib.cuda.get_device_properties(i)
        gpus.append(Device(arch, i, properties.name, properties.total_memory, "cuda", features=features(lib)))
    return tuple(gpus)


class CudaBackend(Backend):
    """NVIDIA GPUs."""

    kind = "cuda"
    torch_type = "cuda"
    archs: Mapping[str, Arch] = ARCHS
    products: Mapping[str, Arch] = PRODUCTS

    def detect(self) -> Sequence[Device]:
        """Every GPU that torch shows; none, at once, when torch is built without CUDA."""
        return devices(torch)

    def memory(self, device: Device) -> int | None:
        """What the driver has left, and what torch holds of it without a tensor in it; as it was found, where
        no runtime answers.
        """
        lib = torch.cuda
        if not lib.is_available():
            return device.memory
        unused = lib.memory_reserved(device.index) - lib.memory_allocated(device.index)
        return int(lib.mem_get_info(device.index)[0] + unused)

    def kernels(self) -> Sequence[Kernel]:
        """Tensor-core kernels first; the portable ones run everything else."""
        from quantport_cuda.kernels import kernels

        return kernels()

    def quantize_weight(self, weight: Tensor, scheme: Scheme) -> StoredWeight | None:
        """Quantizes by Triton, which reads the weight once; None where Triton is missing or has no kernel,
        and for a weight on another device.
        """
        if weight.device.type != self.torch_type:
            return None
        if evidence.refusals(self.kind, target_of(weight.device), "quantize", scheme.name):
            return None
        return quantize_weight(weight, scheme)

    def measured_with(self) -> Mapping[str, object]:
        """The version of Triton, where it is installed."""
        return {} if available() else {"triton": ".".join(map(str, version()))}

    def advice(self) -> Sequence[str]:
        """What is missing to use a GPU: a driver, a torch for it, code for its architecture, or Triton."""
        from quantport_cuda.advice import advice

        return advice(torch)
