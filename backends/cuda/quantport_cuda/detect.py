"""Finds NVIDIA GPUs through torch. Every reader takes what it reads as an argument, so that tests feed fakes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantport.backend import Arch, Backend, Canonical, Device, Kernel, Scheme
from quantport_cuda.capabilities import ARCHS, arch_of
from quantport_triton import evidence
from quantport_triton.launch import target_of
from quantport_triton.weights import quantize_weight

_CUDA = ((12, 8), (12, 9))  # the first cublasLt with block scales for Blackwell, and the first with those of 128x128
DRIVER = Path("/proc/driver/nvidia/version")
_INSTALL = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
_OLD = 'pip install --force-reinstall "torch<2.15" --index-url https://download.pytorch.org/whl/cu126'


def features(lib: Any) -> frozenset[str]:
    """What kernels ask about this build of torch: ``cuda>=12.8``, ``cuda>=12.9``, and ``mslk`` (its MXFP4 kernels)."""
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


def advice(lib: Any, driver: Path = DRIVER, which: Callable[[str], str | None] = shutil.which) -> tuple[str, ...]:
    """What keeps a GPU that the driver shows from being used, with the command that mends it."""
    if not driver.exists() and which("nvidia-smi") is None:
        return ()
    if lib.version.cuda is None:
        return (
            f"an NVIDIA driver is here, but torch {lib.__version__} is built without CUDA; this replaces it: {_INSTALL}\n"
            f"(for drivers older than 580, and for Volta: {_OLD})",
        )
    if not lib.cuda.is_available():
        return (
            f"an NVIDIA driver is here, but torch {lib.__version__} (CUDA {lib.version.cuda}) sees no GPU: "
            f"look at `nvidia-smi` and CUDA_VISIBLE_DEVICES; if the driver is older than this CUDA: {_OLD}",
        )
    return _without_code(lib)


def _without_code(lib: Any) -> tuple[str, ...]:
    """GPUs for which this build of torch holds no machine code."""
    held = lib.cuda.get_arch_list()
    lines = []
    for i in range(lib.cuda.device_count()):
        capability = lib.cuda.get_device_capability(i)
        if not any(runs(entry, capability) for entry in held):
            mend = _OLD if capability < (7, 5) else _INSTALL  # CUDA 13 builds start at 7.5 (pytorch issue 190385)
            sm = "sm_{}{}".format(*capability)
            lines.append(f"torch {lib.__version__} holds no machine code for cuda:{i} ({sm}), only {' '.join(held)}: {mend}")
    return tuple(lines)


def runs(entry: str, capability: tuple[int, int]) -> bool:
    """Whether code for an entry of ``torch.cuda.get_arch_list()`` runs on a GPU.

    Machine code (``sm_86``) runs on the same major version and the same or a later minor one; PTX (``compute_120``) on
    everything later; architecture-specific code (``sm_90a``) on that architecture alone (CUDA C++ Programming Guide,
    "Application Compatibility").
    """
    kind, _, number = entry.partition("_")
    built = divmod(int(number.rstrip("af")), 10)
    if number.endswith("a"):
        return built == capability
    if kind == "compute":
        return built <= capability
    return built[0] == capability[0] and built[1] <= capability[1]


class CudaBackend(Backend):
    """NVIDIA GPUs."""

    kind = "cuda"
    torch_type = "cuda"
    archs: Mapping[str, Arch] = ARCHS

    def detect(self) -> Sequence[Device]:
        """Every GPU that torch shows; none, at once, when torch is built without CUDA."""
        return devices(torch)

    def kernels(self) -> Sequence[Kernel]:
        """Tensor-core kernels first; the portable ones run everything else."""
        from quantport_cuda.kernels import kernels

        return kernels()

    def quantize_weight(self, weight: Tensor, scheme: Scheme) -> Canonical | None:
        """In one read of the weight, by Triton; None where that is missing or has no kernel for it, and for weights elsewhere."""
        if weight.device.type != self.torch_type:
            return None
        if evidence.refusals(self.kind, target_of(weight.device), "quantize", scheme.name):
            return None
        return quantize_weight(weight, scheme)

    def advice(self) -> Sequence[str]:
        """A driver without a torch that can use it, or a torch without code for the GPU."""
        return advice(torch)
