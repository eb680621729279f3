"""What the matrix engines (XMX) of each Intel GPU multiply natively.

Before Xe3p, fp8, fp4 and int4 are storage formats only: oneDNN converts them to a wider type before it
multiplies.
"""

from __future__ import annotations

from quantport.backend import Arch

_ONEDNN = "oneDNN doc/common_concepts/data_types.md at 3f27bec, table Intel Graphics"
_XMX = ("fp16", "bf16", "int8")


def _arch(name: str, family: str, title: str, native: tuple[str, ...], source: str = _ONEDNN) -> Arch:
    return Arch("xpu", name, title, frozenset(native), source, family)


ARCHS = {
    arch.name: arch
    for arch in (
        _arch("pvc", "Xe-HPC", "Intel Data Center GPU Max", _XMX),
        _arch("arc_a", "Xe-HPG", "Intel Arc A, Data Center GPU Flex", _XMX),
        _arch("bmg", "Xe2", "Intel Arc B, Arc Pro B", _XMX),
        _arch("lnl", "Xe2", "Intel Core Ultra 200V (Lunar Lake)", _XMX),
        _arch("ptl", "Xe3", "Intel Core Ultra 300 (Panther Lake), Wildcat Lake, Nova Lake S and U", _XMX),
        _arch("xe3p", "Xe3p", "Intel Nova Lake P", (*_XMX, "e4m3fn", "e5m2")),
    )
}

# Architecture numbers of SYCL: intel/llvm sycl/ext/oneapi/experimental/device_architecture.def.
_NUMBERS = {
    0x30F000700: "pvc",  # pvc
    0x30F400700: "pvc",  # pvc_vg
    0x30DC00800: "arc_a",  # dg2_g10
    0x30E000500: "arc_a",  # dg2_g11
    0x30E400000: "arc_a",  # dg2_g12
    0x500400400: "bmg",  # bmg_g21
    0x500800000: "bmg",  # bmg_g31
    0x501000400: "lnl",  # lnl_m
    0x780000400: "ptl",  # ptl_h
    0x780400100: "ptl",  # ptl_u
    0x780C00000: "ptl",  # wcl
    0x781000400: "ptl",  # nvl_s
    0x781400400: "ptl",  # nvl_u
    0x8C2800000: "xe3p",  # nvl_p
}


def arch_of(number: int, xmx: bool = False) -> Arch:
    """The architecture of a SYCL architecture number.

    An unknown one is named by its number and has only what is safe to assume: fp16, and bf16 where the driver
    reports matrix engines (every Intel GPU with XMX in oneDNN's table has it).

    Args:
        number: ``architecture`` of the device properties.
        xmx: ``has_subgroup_matrix_multiply_accumulate`` of the device properties.
    """
    if number in _NUMBERS:
        return ARCHS[_NUMBERS[number]]
    safe = ("fp16", "bf16") if xmx else ("fp16",)
    source = f"not in quantport's tables: only {' and '.join(safe)} assumed"
    return _arch(f"xe_{number:#x}", "unknown", "unknown Intel architecture", safe, source)
