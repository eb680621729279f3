"""What the cube unit of each Ascend NPU multiplies natively.

Ascend 950 also multiplies HiFloat8, which is not a format of quantport. A chip whose cube unit has no bf16
has none at all: CANN's Cast does not convert it there (hicann/ops-math math/cast/docs/aclnnCast.md).
"""

from __future__ import annotations

import torch

from quantport.backend import Arch

_SOC = "Ascend/pytorch torch_npu/csrc/core/npu/NpuVariables.h at 9e73e708a"
_CANN = "hicann/ops-nn at e5c3fa932, product support tables of quant/*/docs and matmul/*/docs"
_PLUGIN = "Ascend/op-plugin at 517f2e7d, docs/zh/custom_APIs/torch_npu"
_SOURCE = f"{_SOC}; {_CANN}; {_PLUGIN}"

_A2 = ("fp16", "bf16", "int8", "int4")


def _arch(name: str, family: str, title: str, native: tuple[str, ...], source: str = _SOURCE) -> Arch:
    storage_only_dtypes = frozenset() if "bf16" in native else frozenset({torch.bfloat16})
    return Arch("npu", name, title, frozenset(native), source, family, storage_only_dtypes)


ARCHS = {
    arch.name: arch
    for arch in (
        _arch("ascend310p", "310P", "Ascend 310P (Atlas 300I)", ("fp16", "int8")),
        _arch("ascend910b", "A2", "Ascend 910B (Atlas A2)", _A2),
        _arch("ascend910c", "A3", "Ascend 910C (Atlas A3)", _A2),
        _arch("ascend950", "A5", "Ascend 950PR, 950DT", (*_A2, "e4m3fn", "e5m2", "mxfp8", "mxfp4")),
    )
}

# First and last SocVersion of each family in torch_npu.
_RANGES = (
    (200, 205, "ascend310p"),
    (220, 225, "ascend910b"),
    (250, 256, "ascend910c"),
    (260, 260, "ascend950"),
)
_BF16_FROM = 220  # Ascend910B1, from which on torch_npu allows bf16


def arch_of(soc: int, name: str) -> Arch:
    """The architecture of a SocVersion.

    An unknown one is named after the device and has only what is safe to assume: fp16, and bf16 where
    torch_npu allows it.

    Args:
        soc: ``torch_npu._C._npu_get_soc_version()``.
        name: Device name, for example ``Ascend910B2``.
    """
    for first, last, known in _RANGES:
        if first <= soc <= last:
            return ARCHS[known]
    safe = ("fp16", "bf16") if soc >= _BF16_FROM else ("fp16",)
    source = f"SocVersion {soc} is not in quantport's tables: only {' and '.join(safe)} assumed"
    return _arch(name.lower() or f"soc{soc}", "unknown", "unknown Ascend architecture", safe, source)
