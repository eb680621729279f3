"""Finds Ascend NPUs through torch_npu. Every reader takes what it reads as an argument, so that tests feed fakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from quantport.backend import Arch, Backend, Device, Kernel
from quantport_npu.capabilities import ARCHS, arch_of

DEV = Path("/dev")


def devices(lib: Any) -> tuple[Device, ...]:
    """Reads every NPU of ``lib`` (the torch_npu module). A driver that fails raises here."""
    if not lib.npu.is_available():
        return ()
    soc = lib._C._npu_get_soc_version()
    found = []
    for i in range(lib.npu.device_count()):
        name = lib.npu.get_device_name(i)
        found.append(Device(arch_of(soc, name), i, name, lib.npu.get_device_properties(i).total_memory, "npu"))
    return tuple(found)


def installed(find: Callable[[str], object] = find_spec) -> bool:
    """Whether torch_npu is installed, without importing it."""
    return find("torch_npu") is not None


def advice(version: str, has_torch_npu: bool, dev: Path = DEV) -> tuple[str, ...]:
    """What keeps an NPU that the system shows from being used, with the command that mends it.

    Args:
        version: ``torch.__version__``; torch_npu has one build for each minor version.
        has_torch_npu: Whether torch_npu is installed.
        dev: Where the device nodes are.
    """
    nodes = sorted(dev.glob("davinci[0-9]*"))
    if has_torch_npu or not nodes:
        return ()
    minor = ".".join(version.split(".")[:2])
    return (
        f'an Ascend NPU is here ({nodes[0]}), but torch_npu is not installed: pip install "torch-npu=={minor}.*"\n'
        "(it needs CANN: source /usr/local/Ascend/ascend-toolkit/set_env.sh)",
    )


class NpuBackend(Backend):
    """Ascend NPUs."""

    kind = "npu"
    torch_type = "npu"
    archs: Mapping[str, Arch] = ARCHS

    def detect(self) -> Sequence[Device]:
        """Every NPU that torch_npu shows; none, at once, when torch_npu is not installed."""
        return devices(import_module("torch_npu")) if installed() else ()

    def kernels(self) -> Sequence[Kernel]:
        """The portable kernels."""
        from quantport_npu.kernels import kernels

        return kernels()

    def advice(self) -> Sequence[str]:
        """An NPU without torch_npu."""
        return advice(torch.__version__, installed())
