"""Finds the host processor and its memory."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence

from torch import Tensor

from quantport.backend import Arch, Backend, Device, Kernel, KVKernel, Scheme, StoredWeight
from quantport_cpu.capabilities import ARCHS
from quantport_cpu.features import Features, usable_features
from quantport_cpu.jit import is_installed, why_unavailable
from quantport_cpu.memory import at_hand


def arch_of(features: Features, machine: str) -> Arch:
    """Chooses the architecture class from instruction sets and ``platform.machine()``."""
    if machine.lower() in ("arm64", "aarch64"):
        return ARCHS["arm_i8mm" if {"i8mm", "bf16"} <= features else "arm"]
    if {"amx_int8", "amx_bf16"} <= features:
        return ARCHS["x86_amx"]
    if {"avx512_vnni", "avx512_bf16"} <= features:
        return ARCHS["x86_bf16"]
    if features & {"avx512_vnni", "avx_vnni"}:
        return ARCHS["x86_vnni"]
    if "avx512_f" in features:
        return ARCHS["x86_avx512"]
    return ARCHS["x86_avx2" if "avx2" in features else "generic"]


class CpuBackend(Backend):
    """The host processor."""

    kind = "cpu"
    torch_type = "cpu"
    rank = 0
    archs: Mapping[str, Arch] = ARCHS

    def detect(self) -> Sequence[Device]:
        """Always finds exactly one device."""
        features, machine = usable_features(), platform.machine()
        name = platform.processor() or machine
        return (Device(arch_of(features, machine), name=name, memory=at_hand(), features=features),)

    def memory(self, device: Device) -> int | None:
        """What the system, the container and the limits of this process leave."""
        return at_hand()

    def quantize_weight(self, weight: Tensor, scheme: Scheme) -> StoredWeight | None:
        """One compiled pass over BF16 weights, where numba is installed."""
        if why_unavailable():
            return None
        from quantport_cpu.jit.quantize import quantize_weight

        return quantize_weight(weight, scheme)

    def kv_kernel(self) -> KVKernel | None:
        """The compiled kernels, where numba is installed."""
        if why_unavailable():
            return None
        from quantport_cpu.jit.kv_cache import CpuKVKernel

        return CpuKVKernel()

    def measured_with(self) -> Mapping[str, object]:
        """Whether the compiled kernels run."""
        return {"compiled": not why_unavailable()}

    def advice(self) -> Sequence[str]:
        """Names the reason when the compiled kernels are missing."""
        reason = why_unavailable()
        if not reason:
            return ()
        remedy = "" if is_installed() else "; pip install 'quantport[jit]'"
        return (f"{reason}: FP8 and INT4 decode slower and loading takes longer{remedy}",)

    def kernels(self) -> Sequence[Kernel]:
        """Fast kernels first; the portable ones run everything else."""
        from quantport_cpu.kernels import kernels

        return kernels()
