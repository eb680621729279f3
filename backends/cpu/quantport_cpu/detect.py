"""Finds the host processor: its instruction sets, its cores and its memory."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantport.backend import Arch, Backend, Canonical, Device, Kernel, Scheme
from quantport_cpu.capabilities import ARCHS
from quantport_cpu.jit import available

Features = frozenset[str]


def features(cpu: Any = torch.cpu) -> Features:
    """Reads instruction sets: ``get_capabilities()`` where torch has it (2.11 and later), else the private probes."""
    if hasattr(cpu, "get_capabilities"):
        return frozenset(name for name, value in cpu.get_capabilities().items() if value is True)
    probes = {
        "avx2": "_is_avx2_supported",
        "avx512_f": "_is_avx512_supported",
        "avx512_vnni": "_is_vnni_supported",
        "avx512_bf16": "_is_avx512_bf16_supported",
        "amx_tile": "_is_amx_tile_supported",
    }
    found = {name for name, probe in probes.items() if hasattr(cpu, probe) and getattr(cpu, probe)()}
    return frozenset(found | ({"amx_int8", "amx_bf16"} if "amx_tile" in found else set()))


# What ``ONEDNN_MAX_CPU_ISA`` leaves, beyond what every entry before it does. Source: oneDNN ``dev_guide_cpu_dispatcher_control``.
_AVX512 = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
_ONEDNN = {
    "SSE41": (), "AVX": (), "AVX2": ("avx2",), "AVX2_VNNI": ("avx2", "avx_vnni"), "AVX2_VNNI_2": ("avx2", "avx_vnni"),
    "AVX512_CORE": ("avx2", *_AVX512), "AVX512_CORE_VNNI": ("avx2", *_AVX512, "avx512_vnni", "avx_vnni"),
    "AVX512_CORE_BF16": ("avx2", *_AVX512, "avx512_vnni", "avx_vnni", "avx512_bf16"),
    "AVX512_CORE_FP16": ("avx2", *_AVX512, "avx512_vnni", "avx_vnni", "avx512_bf16"),
}  # fmt: skip
# What architectures differ in.
_CHOSEN = {"avx2", *_AVX512, "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"}


def restricted(found: Features, capability: str, environment: Mapping[str, str]) -> Features:
    """Instruction sets that torch and oneDNN may use: ``ATEN_CPU_CAPABILITY`` and ``ONEDNN_MAX_CPU_ISA`` take some away.

    Args:
        found: What the processor has.
        capability: ``torch.backends.cpu.get_cpu_capability()``.
        environment: Of the process.
    """
    limit = environment.get("ONEDNN_MAX_CPU_ISA", environment.get("DNNL_MAX_CPU_ISA", "")).upper()
    hidden = _CHOSEN - set(_ONEDNN.get(limit, _CHOSEN))
    if capability == "AVX2":
        hidden |= {name for name in found if name.startswith(("avx512", "amx"))}
    elif capability in ("DEFAULT", "NO AVX"):
        hidden |= {name for name in found if name.startswith(("avx", "amx"))}
    return found - hidden


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


def memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that a new allocation can get without swapping; total memory where the system tells no more."""
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


class CpuBackend(Backend):
    """The host processor."""

    kind = "cpu"
    torch_type = "cpu"
    rank = 0
    archs: Mapping[str, Arch] = ARCHS

    def detect(self) -> Sequence[Device]:
        """Always finds exactly one device."""
        found = restricted(features(), torch.backends.cpu.get_cpu_capability(), os.environ)
        name = platform.processor() or platform.machine()
        return (Device(arch_of(found, platform.machine()), name=name, memory=memory(), features=found),)

    def quantize_weight(self, weight: Tensor, scheme: Scheme) -> Canonical | None:
        """One compiled pass over BF16 weights, where numba is installed."""
        if available():
            return None
        from quantport_cpu.jit.quantize import quantize_weight

        return quantize_weight(weight, scheme)

    def advice(self) -> Sequence[str]:
        """Names the reason when the compiled kernels are missing."""
        why = available()
        return (f"{why}: FP8 and INT4 decode slower and loading takes longer; pip install 'quantport[jit]'",) if why else ()

    def kernels(self) -> Sequence[Kernel]:
        """Fast kernels first; the portable ones run everything else."""
        from quantport_cpu.kernels import kernels

        return kernels()
