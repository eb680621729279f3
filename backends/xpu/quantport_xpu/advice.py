"""Why an Intel GPU cannot be used, with the command that fixes it. What is read is passed in, so that tests
can pass fakes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from ctypes.util import find_library
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantport_xpu import vendor
from quantport_xpu.kernels.operators import registered
from quantport_xpu.kernels.triton import backend_reason

INTEL = "0x8086"
OPERATORS = ("_int_mm", "_scaled_mm", "_weight_int8pack_mm", "_weight_int4pack_mm_with_scales_and_zeros")
INDEX = "--index-url https://download.pytorch.org/whl/xpu"
_TORCH = f"pip install --force-reinstall torch {INDEX}"
_DRIVER = "sudo apt install libze1 libze-intel-gpu1"
_NEWER = "sudo add-apt-repository -y ppa:kobuk-team/intel-graphics"  # dgpu-docs.intel.com, Client GPUs
_GROUP = "sudo usermod -aG render $USER, and log in again"
_MASKS = ("ZE_AFFINITY_MASK", "ONEAPI_DEVICE_SELECTOR")


@dataclass(frozen=True)
class Surroundings:
    """The parts of the system that are looked at: sysfs, libraries, permissions, environment variables,
    torch's dispatcher, Triton, and the vendor's package.
    """

    drm: Path = Path("/sys/class/drm")
    library: Callable[[str], str | None] = find_library
    opens: Callable[[str], bool] = lambda path: os.access(path, os.R_OK | os.W_OK)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    registered: Callable[[str], bool] = registered
    triton: Callable[[], str] = backend_reason
    package: Callable[[], str] = vendor.load


def render_nodes(drm: Path) -> tuple[str, ...]:
    """Names of the render nodes of Intel GPUs, from their PCI vendor in sysfs."""
    vendors = {node.name: node / "device" / "vendor" for node in sorted(drm.glob("renderD*"))}
    return tuple(
        name for name, vendor in vendors.items() if vendor.exists() and vendor.read_text().strip() == INTEL
    )


def advice(lib: Any, system: Surroundings | None = None) -> tuple[str, ...]:
    """One line for each thing that is missing; none without an Intel GPU, or where it is fully used.

    Args:
        lib: The torch module.
        system: The system; this machine by default.
    """
    system = system or Surroundings()
    if hasattr(lib, "xpu") and lib.xpu.is_available():
        return _incomplete(lib, system)
    nodes = render_nodes(system.drm)
    if not nodes:
        return ()
    seen = f"an Intel GPU is here (/dev/dri/{nodes[0]})"
    if getattr(lib.version, "xpu", None) is None:
        return (
            f"{seen}, but torch {lib.__version__} is built without XPU; "
            f"if it is an Arc, a Data Center GPU, or in a Core Ultra, this replaces it: {_TORCH}",
        )
    return (
        f"{seen}, but torch {lib.__version__} (XPU {lib.version.xpu}) does not see it: "
        f"{_unseen(nodes[0], system)}",
    )


def _unseen(node: str, system: Surroundings) -> str:
    """The first reason why a torch that is built for XPU sees no GPU."""
    if system.library("ze_loader") is None:
        return f"the Level Zero loader (libze_loader) is missing: {_DRIVER}"
    if not system.opens(f"/dev/dri/{node}"):
        return f"you may not open /dev/dri/{node}: {_GROUP}"
    masks = [f"{name}={system.environ[name]}" for name in _MASKS if system.environ.get(name)]
    if masks:
        return (
            f"{' and '.join(masks)} may hide it: unset {' '.join(mask.partition('=')[0] for mask in masks)}"
        )
    if system.library("ze_intel_gpu") is None:
        return (
            f"the Level Zero loader is here, but not its driver for Intel GPUs (libze_intel_gpu): {_DRIVER}"
        )
    return (
        f"its driver may be older than this GPU or this torch wants: sudo apt update && {_DRIVER}; "
        f"on Ubuntu 24.04, before that, for newer ones: {_NEWER}"
    )


def _incomplete(lib: Any, system: Surroundings) -> tuple[str, ...]:
    """What a torch that sees a GPU lacks: operators, Triton's backend, a package that loads."""
    lines = []
    if lacking := [name for name in OPERATORS if not system.registered(name)]:
        upgrade = f"pip install --upgrade torch {INDEX}"
        lines.append(
            f"torch {lib.__version__} has no {', '.join(f'aten::{name}' for name in lacking)} on "
            f"XPU: {upgrade}"
        )
    if reason := system.triton():
        lines.append(reason)
    if failure := system.package():
        install = f"pip install --upgrade vllm-xpu-kernels, or one that is made for torch {lib.__version__}"
        lines.append(f"vllm-xpu-kernels is installed, but does not load ({failure}): {install}")
    return tuple(lines)
