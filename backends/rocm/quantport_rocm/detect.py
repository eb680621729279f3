"""Finds AMD GPUs through torch. Every reader takes what it reads as an argument, so that tests feed fakes."""

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
DISPLAY = "0x03"  # of the PCI class: VGA, 3D and other display controllers
_INSTALL = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/rocm7.2"


def features(lib: Any) -> frozenset[str]:
    """What kernels ask about this build of torch: ``rocm>=6.5``."""
    version = tuple(int(part) for part in lib.version.hip.split(".")[:2])
    return frozenset({"rocm>=6.5"} if version >= (6, 5) else ())


def devices(lib: Any) -> tuple[Device, ...]:
    """Reads every GPU of ``lib`` (the torch module). A driver that fails raises here.

    The name of the architecture decides, never ``get_device_capability()``: it collides with NVIDIA's numbers
    (gfx90a reads as 9.0).
    """
    if lib.version.hip is None or not lib.cuda.is_available():
        return ()
    found = []
    for i in range(lib.cuda.device_count()):
        box = lib.cuda.get_device_properties(i)
        found.append(
            Device(arch_of(box.gcnArchName), i, box.name, box.total_memory, "cuda", features=features(lib))
        )
    return tuple(found)


def gpus(pci: Path) -> tuple[str, ...]:
    """PCI addresses of AMD GPUs."""
    found = [
        d
        for d in sorted(pci.glob("*"))
        if (d / "vendor").is_file() and (d / "vendor").read_text().strip() == AMD
    ]
    return tuple(d.name for d in found if (d / "class").read_text().startswith(DISPLAY))


def _opens(path: Path) -> bool:
    return os.access(path, os.R_OK | os.W_OK)


def advice(
    lib: Any, driver: Path = DRIVER, pci: Path = PCI, opens: Callable[[Path], bool] = _opens
) -> tuple[str, ...]:
    """What keeps a GPU that PCI or the driver shows from being used, with the command that mends it."""
    if not driver.exists():
        mend = f"but not its driver ({driver}): sudo modprobe amdgpu"
        return tuple(f"an AMD GPU is here (PCI {name}), {mend}" for name in gpus(pci)[:1])
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

    def kernels(self) -> Sequence[Kernel]:
        """Matrix-core kernels first; the portable ones run everything else."""
        from quantport_rocm.kernels import kernels

        return kernels()

    def advice(self) -> Sequence[str]:
        """A driver without a torch that can use it."""
        return advice(torch)
