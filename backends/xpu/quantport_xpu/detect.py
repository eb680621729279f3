"""Finds Intel GPUs through torch. Every reader takes what it reads as an argument, so that tests feed fakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantport.backend import Arch, Backend, Device, Kernel
from quantport_xpu.capabilities import ARCHS, arch_of

DRM = Path("/sys/class/drm")
INTEL = "0x8086"
_INSTALL = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/xpu"


def devices(lib: Any) -> tuple[Device, ...]:
    """Reads every GPU of ``lib`` (the torch module). A driver that fails raises here."""
    if not hasattr(lib, "xpu") or not lib.xpu.is_available():
        return ()
    found = []
    for i in range(lib.xpu.device_count()):
        box = lib.xpu.get_device_properties(i)
        arch = arch_of(box.architecture, box.has_subgroup_matrix_multiply_accumulate)
        found.append(Device(arch, i, box.name, box.total_memory, "xpu"))
    return tuple(found)


def render_nodes(drm: Path = DRM) -> tuple[str, ...]:
    """Names of the render nodes of Intel GPUs, from their PCI vendor in sysfs."""
    vendors = {node.name: node / "device" / "vendor" for node in sorted(drm.glob("renderD*"))}
    return tuple(name for name, vendor in vendors.items() if vendor.exists() and vendor.read_text().strip() == INTEL)


def advice(lib: Any, drm: Path = DRM) -> tuple[str, ...]:
    """What keeps a GPU that the system shows from being used, with the command that mends it."""
    nodes = render_nodes(drm)
    if not nodes:
        return ()
    seen = f"an Intel GPU is here (/dev/dri/{nodes[0]})"
    if getattr(lib.version, "xpu", None) is None:
        return (
            f"{seen}, but torch {lib.__version__} is built without XPU; "
            f"if it is an Arc, a Data Center GPU, or in a Core Ultra, this replaces it: {_INSTALL}",
        )
    if not lib.xpu.is_available():
        return (
            f"{seen}, but torch {lib.__version__} (XPU {lib.version.xpu}) does not see it: "
            "install the Level Zero driver (`sudo apt install libze1 libze-intel-gpu1`), and if you may not open the device: "
            "sudo usermod -aG render $USER",
        )
    return ()


class XpuBackend(Backend):
    """Intel GPUs."""

    kind = "xpu"
    torch_type = "xpu"
    archs: Mapping[str, Arch] = ARCHS

    def detect(self) -> Sequence[Device]:
        """Every GPU that torch shows; none, at once, when torch is built without XPU."""
        return devices(torch)

    def kernels(self) -> Sequence[Kernel]:
        """XMX kernels first; the portable ones run everything else."""
        from quantport_xpu.kernels import kernels

        return kernels()

    def advice(self) -> Sequence[str]:
        """A GPU without a torch that can use it."""
        return advice(torch)
