"""What keeps an Intel GPU from being used, and the command that mends it. Whatever is read is an argument:
tests feed fakes.
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
    """Where to look: sysfs, the library path, permissions, variables, torch's dispatcher, Triton, and the
    vendor's package.
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


def advice(lib: Any, here: Surroundings | None = None) -> tuple[str, ...]:
    """A line for whatever is missing; nothing where no Intel GPU is seen, or where it is used well.

    Args:
        lib: The torch module.
        here: Where to look; this machine by default.
    """
    here = here or Surroundings()
    if hasattr(lib, "xpu") and lib.xpu.is_available():
        return _incomplete(lib, here)
    nodes = render_nodes(here.drm)
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
        f"{_unseen(nodes[0], here)}",
    )


def _unseen(node: str, here: Surroundings) -> str:
    """Why a torch that is built for XPU sees no GPU: the first cause that is found."""
    if here.library("ze_loader") is None:
        return f"the Level Zero loader (libze_loader) is missing: {_DRIVER}"
    if not here.opens(f"/dev/dri/{node}"):
        return f"you may not open /dev/dri/{node}: {_GROUP}"
    masks = [f"{name}={here.environ[name]}" for name in _MASKS if here.environ.get(name)]
    if masks:
        return (
            f"{' and '.join(masks)} may hide it: unset {' '.join(mask.partition('=')[0] for mask in masks)}"
        )
    if here.library("ze_intel_gpu") is None:
        return (
            f"the Level Zero loader is here, but not its driver for Intel GPUs (libze_intel_gpu): {_DRIVER}"
        )
    return (
        f"its driver may be older than this GPU or this torch wants: sudo apt update && {_DRIVER}; "
        f"on Ubuntu 24.04, before that, for newer ones: {_NEWER}"
    )


def _incomplete(lib: Any, here: Surroundings) -> tuple[str, ...]:
    """What is missing beside a torch that sees a GPU: operators, Triton's backend, a package that does not
    load.
    """
    lines = []
    if lacking := [name for name in OPERATORS if not here.registered(name)]:
        upgrade = f"pip install --upgrade torch {INDEX}"
        lines.append(
            f"torch {lib.__version__} has no {', '.join(f'aten::{name}' for name in lacking)} on "
            f"XPU: {upgrade}"
        )
    if reason := here.triton():
        lines.append(reason)
    if failure := here.package():
        mend = f"pip install --upgrade vllm-xpu-kernels, or one that is made for torch {lib.__version__}"
        lines.append(f"vllm-xpu-kernels is installed, but does not load ({failure}): {mend}")
    return tuple(lines)
