"""Why an NVIDIA GPU cannot be used, with the command that fixes it. What is read is passed in, so that tests
can pass fakes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantport_triton import available

NVIDIA = "0x10de"
DISPLAY = "0x03"  # prefix of the PCI classes of VGA and 3D controllers
# The oldest driver for each CUDA: CUDA Toolkit release notes, "CUDA Minor Version Compatibility".
DRIVERS = {12: 525, 13: 580}
INDEX = "--index-url https://download.pytorch.org/whl"
_INSTALL = f"pip install --force-reinstall torch {INDEX}/cu130"
_OLD = f'pip install --force-reinstall "torch<2.15" {INDEX}/cu126'
_DRIVER = "sudo ubuntu-drivers install, and restart"


@dataclass(frozen=True)
class Surroundings:
    """The parts of the system that are looked at: the driver's version, PCI, programs, and Triton."""

    driver: Path = Path("/proc/driver/nvidia/version")
    pci: Path = Path("/sys/bus/pci/devices")
    which: Callable[[str], str | None] = shutil.which
    triton: Callable[[], str] = available


def gpus(pci: Path) -> tuple[str, ...]:
    """PCI addresses of NVIDIA GPUs."""
    devices = [d for d in sorted(pci.glob("*")) if (d / "vendor").is_file()]
    nvidia = [d for d in devices if (d / "vendor").read_text().strip() == NVIDIA]
    return tuple(d.name for d in nvidia if (d / "class").read_text().startswith(DISPLAY))


def advice(lib: Any, system: Surroundings | None = None) -> tuple[str, ...]:
    """One line for each thing that is missing; none without an NVIDIA GPU, or where it is fully used.

    Args:
        lib: The torch module.
        system: The system; this machine by default.
    """
    system = system or Surroundings()
    if not system.driver.exists() and system.which("nvidia-smi") is None:
        return tuple(
            f"an NVIDIA GPU is here (PCI {name}), but not its driver: {_DRIVER}"
            for name in gpus(system.pci)[:1]
        )
    if lib.version.cuda is None:
        return (
            f"an NVIDIA driver is here, but torch {lib.__version__} is built without CUDA; this "
            f"replaces it: {_INSTALL}\n"
            f"(for drivers older than 580, and for Volta: {_OLD})",
        )
    if not lib.cuda.is_available():
        seen = (
            f"an NVIDIA driver is here, but torch {lib.__version__} (CUDA {lib.version.cuda}) sees no GPU: "
        )
        return (seen + _unseen(lib, system.driver),)
    triton = system.triton()
    return (*_without_code(lib), *((f"most fast kernels are Triton's: {triton}",) if triton else ()))


def _unseen(lib: Any, driver: Path) -> str:
    """Why a torch that is built for CUDA sees no GPU."""
    version = re.search(r"Module.*?\s(\d{3})\.\d", driver.read_text()) if driver.is_file() else None
    oldest = DRIVERS.get(int(lib.version.cuda.partition(".")[0]))
    if version and oldest and int(version[1]) < oldest:
        return (
            f"its driver is {version[1]}, and this CUDA wants {oldest} or later: {_DRIVER}; or a torch "
            f"for the driver: {_OLD}"
        )
    return f"look at `nvidia-smi` and CUDA_VISIBLE_DEVICES; if the driver is older than this CUDA: {_OLD}"


def _without_code(lib: Any) -> tuple[str, ...]:
    """A line for each GPU for which this build of torch holds no machine code."""
    built_for = lib.cuda.get_arch_list()
    lines = []
    for i in range(lib.cuda.device_count()):
        capability = lib.cuda.get_device_capability(i)
        if not any(runs(entry, capability) for entry in built_for):
            # Builds for CUDA 13 start at 7.5 (pytorch issue 190385).
            install = _OLD if capability < (7, 5) else _INSTALL
            sm = "sm_{}{}".format(*capability)
            lines.append(
                f"torch {lib.__version__} holds no machine code for cuda:{i} ({sm}), only "
                f"{' '.join(built_for)}: {install}"
            )
    return tuple(lines)


def runs(entry: str, capability: tuple[int, int]) -> bool:
    """Whether code for an entry of ``torch.cuda.get_arch_list()`` runs on a GPU.

    Machine code (``sm_86``) runs on the same major version and the same or a later minor one, PTX
    (``compute_120``) on that version and all later ones, and architecture-specific code (``sm_90a``) on that
    architecture only (CUDA C++ Programming Guide, "Application Compatibility").
    """
    kind, _, number = entry.partition("_")
    built = divmod(int(number.rstrip("af")), 10)
    if number.endswith("a"):
        return built == capability
    if kind == "compute":
        return built <= capability
    return built[0] == capability[0] and built[1] <= capability[1]
