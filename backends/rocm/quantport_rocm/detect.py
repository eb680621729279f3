"""Finds AMD GPUs through torch. What is read is passed in, so that tests can pass fakes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantport.backend import Arch, Backend, Device, Kernel
from quantport_rocm.capabilities import ARCHS, arch_of
from quantport_rocm.products import PRODUCTS

DRIVER = Path("/dev/kfd")
PCI = Path("/sys/bus/pci/devices")
AMD = "0x1002"
DISPLAY = "0x03"  # prefix of the PCI classes of display controllers
_INSTALL = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/rocm7.2"


def features(lib: Any) -> frozenset[str]:
    """What kernels need to know of this build of torch: ``rocm>=6.5``."""
    version = tuple(int(part) for part in lib.version.hip.split(".")[:2])
    return frozenset({"rocm>=6.5"} if version >= (6, 5) else ())


def devices(lib: Any) -> tuple[Device, ...]:
    """Every GPU of ``lib``, the torch module. Raises what a failing driver raises.

    The name of the architecture decides, not ``get_device_capability()``, which collides with NVIDIA's
    numbers: gfx90a reports 9.0.
    """
    if lib.version.hip is None or not lib.cuda.is_available():
        return ()
    amd_gpus = []
    for i in range(lib.cuda.device_count()):
        properties = lib.cuda.get_device_properties(i)
        arch = arch_of(properties.gcnArchName)
        amd_gpus.append(
            Device(arch, i, properties.name, properties.total_memory, "cuda", features=features(lib))
        )
    return tuple(amd_gpus)


def gpus(pci: Path) -> tuple[str, ...]:
    """PCI addresses of AMD GPUs."""
    devices = [d for d in sorted(pci.glob("*")) if (d / "vendor").is_file()]
    amd = [d for d in devices if (d / "vendor").read_text().strip() == AMD]
    return tuple(d.name for d in amd if (d / "class").read_text().startswith(DISPLAY))


def _opens(path: Path) -> bool:
    return os.access(path, os.R_OK | os.W_OK)


def advice(
    lib: Any, driver: Path = DRIVER, pci: Path = PCI, opens: Callable[[Path], bool] = _opens
) -> tuple[str, ...]:
    """Why a GPU that PCI or the driver shows cannot be used, with the command that fixes it."""
    if not driver.exists():
        missing = f"but not its driver ({driver}): sudo modprobe amdgpu"
        return tuple(f"an AMD GPU is here (PCI {name}), {missing}" for name in gpus(pci)[:1])
    if lib.version.hip is None:
        return (
            f"an AMD GPU driver is here ({driver}), but torch {lib.__version__} is built without ROCm; "
            f"this replaces it: {_INSTALL}",
        )
    if not lib.cuda.is_available():
        seen = (
            f"an AMD GPU driver is here ({driver}), but torch {lib.__version__} (HIP {lib.version.hip}) "
            "sees no GPU: "
        )
        if not opens(driver):
            return (
                f"{seen}you may not open {driver}: sudo usermod -aG render,video $USER, and log in again",
            )
        return (f"{seen}look at `rocminfo`, and unset HIP_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES",)
    return ()


class RocmBackend(Backend):
    """AMD GPUs. torch calls their devices ``cuda``."""

    kind = "rocm"
    torch_type = "cuda"
    archs: Mapping[str, Arch] = ARCHS
    products: Mapping[str, Arch] = PRODUCTS

    def detect(self) -> Sequence[Device]:
        """Every GPU that torch shows; none, at once, when torch is built without ROCm."""
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
        """Matrix-core kernels first; the portable ones run everything else."""
        from quantport_rocm.kernels import kernels

        return kernels()

    def advice(self) -> Sequence[str]:
        """What is missing to use a GPU: its driver, a torch for it, or the right to open it."""
        return advice(torch)
