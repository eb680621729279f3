"""Instruction sets of the host processor, less those that the environment forbids torch and oneDNN to use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

Features = frozenset[str]


def features(cpu: Any = torch.cpu) -> Features:
    """Reads instruction sets from ``get_capabilities()`` (torch 2.11 and later), or from private probes."""
    if hasattr(cpu, "get_capabilities"):
        return frozenset(name for name, value in cpu.get_capabilities().items() if value is True)
    probes = {
        "avx2": "_is_avx2_supported",
        "avx512_f": "_is_avx512_supported",
        "avx512_vnni": "_is_vnni_supported",
        "avx512_bf16": "_is_avx512_bf16_supported",
        "amx_tile": "_is_amx_tile_supported",
    }
    present = {name for name, probe in probes.items() if hasattr(cpu, probe) and getattr(cpu, probe)()}
    return frozenset(present | ({"amx_int8", "amx_bf16"} if "amx_tile" in present else set()))


# What each value of ``ONEDNN_MAX_CPU_ISA`` allows. Source: oneDNN ``dev_guide_cpu_dispatcher_control``.
_AVX512 = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
_ONEDNN = {
    "SSE41": (),
    "AVX": (),
    "AVX2": ("avx2",),
    "AVX2_VNNI": ("avx2", "avx_vnni"),
    "AVX2_VNNI_2": ("avx2", "avx_vnni"),
    "AVX512_CORE": ("avx2", *_AVX512),
    "AVX512_CORE_VNNI": ("avx2", *_AVX512, "avx512_vnni", "avx_vnni"),
    "AVX512_CORE_BF16": ("avx2", *_AVX512, "avx512_vnni", "avx_vnni", "avx512_bf16"),
    "AVX512_CORE_FP16": ("avx2", *_AVX512, "avx512_vnni", "avx_vnni", "avx512_bf16"),
}
# The instruction sets by which architectures are told apart.
_DISTINGUISHING = {
    "avx2",
    *_AVX512,
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
}


def restricted(present: Features, capability: str, environment: Mapping[str, str]) -> Features:
    """Instruction sets that ``ATEN_CPU_CAPABILITY`` and ``ONEDNN_MAX_CPU_ISA`` leave to torch and oneDNN.

    Args:
        present: Those that the processor has.
        capability: ``torch.backends.cpu.get_cpu_capability()``.
        environment: Variables of the process.
    """
    limit = environment.get("ONEDNN_MAX_CPU_ISA", environment.get("DNNL_MAX_CPU_ISA", "")).upper()
    hidden = _DISTINGUISHING - set(_ONEDNN.get(limit, _DISTINGUISHING))
    if capability == "AVX2":
        hidden |= {name for name in present if name.startswith(("avx512", "amx"))}
    elif capability in ("DEFAULT", "NO AVX"):
        hidden |= {name for name in present if name.startswith(("avx", "amx"))}
    return present - hidden


def usable_features() -> Features:
    """Instruction sets that torch and oneDNN may use in this process."""
    return restricted(features(), torch.backends.cpu.get_cpu_capability(), os.environ)
