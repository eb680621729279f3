"""What the matrix cores of each AMD architecture multiply natively.

The e4m3 of gfx942 is e4m3fnuz (up to 240), that of gfx950 and gfx12 is e4m3fn (up to 448): two formats.
"""

from __future__ import annotations

from dataclasses import replace

from quantport.backend import Arch

_LLVM = "MFMA or WMMA instruction assembled per architecture with the LLVM of the triton 3.9.0 wheel"
_CALC = f"{_LLVM}; ROCm/amd_matrix_instruction_calculator matrix_calculator.py at 2ef9189"
_ROCM = f"{_CALC}; ROCm/ROCm docs/reference/precision-support.rst at e396b4898"
_CDNA4 = f"{_CALC}; rocm.blogs.amd.com, Matrix Core Programming on CDNA3 and CDNA4"

_CDNA = ("fp16", "bf16", "int8")
_RDNA = ("fp16", "bf16", "int8", "int4")


def _arch(name: str, family: str, title: str, native: tuple[str, ...], source: str) -> Arch:
    return Arch("rocm", name, title, frozenset(native), source, family)


ARCHS = {
    arch.name: arch
    for arch in (
        _arch("gfx908", "CDNA", "AMD Instinct MI100", _CDNA, _ROCM),
        _arch("gfx90a", "CDNA2", "AMD Instinct MI210, MI250, MI250X", _CDNA, _ROCM),
        _arch(
            "gfx942", "CDNA3", "AMD Instinct MI300A, MI300X, MI325X", (*_CDNA, "e4m3fnuz", "e5m2fnuz"), _ROCM
        ),
        _arch(
            "gfx950",
            "CDNA4",
            "AMD Instinct MI350X, MI355X",
            (*_CDNA, "e4m3fn", "e5m2", "mxfp8", "mxfp6", "mxfp4"),
            _CDNA4,
        ),
        _arch("gfx1100", "RDNA3", "AMD Radeon RX 7900, PRO W7900", _RDNA, _CALC),
        _arch("gfx1151", "RDNA3.5", "AMD Ryzen AI Max (Strix Halo)", _RDNA, _CALC),
        _arch("gfx1200", "RDNA4", "AMD Radeon RX 9060", (*_RDNA, "e4m3fn", "e5m2"), _CALC),
        _arch("gfx1201", "RDNA4", "AMD Radeon RX 9070, AI PRO R9700", (*_RDNA, "e4m3fn", "e5m2"), _CALC),
    )
}

# Early names of gfx942, which LLVM no longer takes.
_RENAMED = {"gfx940": "gfx942", "gfx941": "gfx942"}
# Architectures with the instructions of another.
_SIBLINGS = {
    **dict.fromkeys(("gfx1101", "gfx1102", "gfx1103"), "gfx1100"),
    **dict.fromkeys(("gfx1150", "gfx1152", "gfx1153"), "gfx1151"),
}


def arch_of(gcn: str) -> Arch:
    """The architecture of a ``gcnArchName``, for example ``gfx942:sramecc+:xnack-``.

    An unknown one (also gfx906 and gfx1030, which have dot products but no matrix instructions) has its own
    name and only what is safe to assume: fp16 as the type to compute in.
    """
    short = gcn.split(":")[0]
    name = _RENAMED.get(short, short)
    if name in ARCHS:
        return ARCHS[name]
    if name in _SIBLINGS:
        sibling = ARCHS[_SIBLINGS[name]]
        return replace(sibling, name=name, title=f"AMD {sibling.family}")
    return _arch(
        name, "unknown", "unknown AMD architecture", ("fp16",), "not in quantport's tables: only fp16 assumed"
    )
