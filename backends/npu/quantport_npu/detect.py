"""Finds Ascend NPUs through torch_npu. What is read is passed in, so that tests can pass fakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from quantport.backend import Arch, Backend, Device, Kernel
from quantport_npu.capabilities import ARCHS, arch_of
from quantport_npu.products import PRODUCTS


def devices(lib: Any) -> tuple[Device, ...]:
    """Every NPU of ``lib``, the torch_npu module. Raises what a failing driver raises.

    The only feature of a device is the version of CANN.
    """
    if not lib.npu.is_available():
        return ()
    soc = lib._C._npu_get_soc_version()
    features = frozenset(filter(None, [cann(lib)]))
    npus = []
    for i in range(lib.npu.device_count()):
        name = lib.npu.get_device_name(i)
        memory = lib.npu.get_device_properties(i).total_memory
        npus.append(Device(arch_of(soc, name), i, name, memory, "npu", features=features))
    return tuple(npus)


def cann(lib: Any) -> str:
    """The version of CANN, for example ``cann 8.5.0``; empty where torch_npu does not say."""
    try:
        version = lib.npu.utils.get_cann_version()
    # Builds lack the function, and a CANN that was moved makes it fail; the device runs all the same.
    except Exception:
        return ""
    return f"cann {version}" if version else ""


def installed(find: Callable[[str], object] = find_spec) -> bool:
    """Whether torch_npu is installed, without importing it."""
    return find("torch_npu") is not None


class NpuBackend(Backend):
    """Ascend NPUs."""

    kind = "npu"
    torch_type = "npu"
    archs: Mapping[str, Arch] = ARCHS
    products: Mapping[str, Arch] = PRODUCTS

    def detect(self) -> Sequence[Device]:
        """Every NPU that torch_npu shows; none, at once, when torch_npu is not installed."""
        return devices(import_module("torch_npu")) if installed() else ()

    def memory(self, device: Device) -> int | None:
        """What the driver has left, and what torch_npu holds of it without a tensor in it."""
        lib = import_module("torch_npu").npu
        unused = lib.memory_reserved(device.index) - lib.memory_allocated(device.index)
        return int(lib.mem_get_info(device.index)[0] + unused)

    def kernels(self) -> Sequence[Kernel]:
        """Kernels of torch_npu's operators first; the portable ones run everything else."""
        from quantport_npu.kernels import kernels

        return kernels()

    def advice(self) -> Sequence[str]:
        """What is missing to use an NPU: the driver, torch_npu for this torch, CANN."""
        from quantport_npu.advice import Surroundings, advice

        return advice(torch.__version__, Surroundings())
