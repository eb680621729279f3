"""Finds the host processor and its memory."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence

from torch import Tensor

from quantport.backend import Arch, Backend, Device, Kernel, Scheme, StoredWeight
from quantport_cpu.capabilities import ARCHS
from quantport_cpu.features import Features, usable_features
from quantport_cpu.jit import available, is_installed
from quantport_cpu.memory import at_hand


def arch_of(found: Features, machine: str) -> Arch:
    """Chooses the architecture class from instruction sets and ``platform.machine()``."""
    if machine.lower() in ("arm64", "aarch64"):
        return ARCHS["arm_i8mm" if {"i8mm", "bf16"} <= found else "arm"]
    if {"amx_int8", "amx_bf16"} <= found:
        return ARCHS["x86_amx"]
    if {"avx512_vnni", "avx512_bf16"} <= found:
        return ARCHS["x86_bf16"]
    if found & {"avx512_vnni", "avx_vnni"}:
        return ARCHS["x86_vnni"]
    if "avx512_f" in found:
        return ARCHS["x86_avx512"]
    return ARCHS["x86_avx2" if "avx2" in found else "generic"]


class CpuBackend(Backend):
    """The host processor."""

    kind = "cpu"
    torch_type = "cpu"
    rank = 0
    archs: Mapping[str, Arch] = ARCHS

    def detect(self) -> Sequence[Device]:
        """Always finds exactly one device."""
        found = usable_features()
        name = platform.processor() or platform.machine()
        return (Device(arch_of(found, platform.machine()), name=name, memory=at_hand(), features=found),)

    def memory(self, device: Device) -> int | None:
        """What the system, the container and the limits of this process leave."""
        return at_hand()

    def quantize_weight(self, weight: Tensor, scheme: Scheme) -> StoredWeight | None:
        """One compiled pass over BF16 weights, where numba is installed."""
        if available():
            return None
        from quantport_cpu.jit.quantize import quantize_weight

        return quantize_weight(weight, scheme)

    def advice(self) -> Sequence[str]:
        """Names the reason when the compiled kernels are missing."""
        why = available()
        if not why:
            return ()
        mend = "" if is_installed() else "; pip install 'quantport[jit]'"
        return (f"{why}: FP8 and INT4 decode slower and loading takes longer{mend}",)

    def kernels(self) -> Sequence[Kernel]:
        """Fast kernels first; the portable ones run everything else."""
        from quantport_cpu.kernels import kernels

        return kernels()
