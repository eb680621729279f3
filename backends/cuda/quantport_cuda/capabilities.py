"""What the tensor cores of each NVIDIA architecture multiply natively.

On sm_90, e4m3fn is native through ``wgmma`` only, which needs code for sm_90a; ``mma.sync`` unpacks it to
fp16. From sm_90 on, an int4 multiplication is expanded to int8, so int4 is not native there.
"""

from __future__ import annotations

from dataclasses import replace

from quantport.backend import Arch

_PTXAS = "PTX assembled with ptxas 12.9.86 and 13.4.59 (triton 3.9.0 wheel), SASS read with nvdisasm"
_VOLTA = "PTX assembled with ptxas 12.9.86, SASS read with nvdisasm of the triton 3.4.0 wheel"
_CUTLASS = f"{_PTXAS}; NVIDIA/cutlass media/docs/cpp/blackwell_functionality.md at 7107b0553"
_SM103 = f"{_CUTLASS}; int8 through mma.sync only, tcgen05 has no kind::i8 here: slower than bf16"

_AMPERE = ("fp16", "bf16", "int8", "int4")
_HOPPER = ("fp16", "bf16", "int8", "e4m3fn", "e5m2")
_BLACKWELL = (*_HOPPER, "mxfp8", "mxfp6", "mxfp4", "nvfp4")


def _arch(name: str, family: str, title: str, native: tuple[str, ...], source: str = _PTXAS) -> Arch:
    return Arch("cuda", name, title, frozenset(native), source, family)


ARCHS = {
    arch.name: arch
    for arch in (
        _arch("sm_70", "Volta", "NVIDIA V100", ("fp16",), _VOLTA),
        _arch("sm_75", "Turing", "NVIDIA T4, RTX 20", ("fp16", "int8", "int4")),
        _arch("sm_80", "Ampere", "NVIDIA A100, A30", _AMPERE),
        _arch("sm_86", "Ampere", "NVIDIA A10, A40, RTX 30", _AMPERE),
        _arch("sm_89", "Ada", "NVIDIA L4, L40S, RTX 40", (*_AMPERE, "e4m3fn", "e5m2")),
        _arch("sm_90", "Hopper", "NVIDIA H100, H200", _HOPPER),
        _arch("sm_100", "Blackwell", "NVIDIA B200, GB200", _BLACKWELL, _CUTLASS),
        _arch("sm_103", "Blackwell", "NVIDIA B300, GB300", _BLACKWELL, _SM103),
        _arch("sm_120", "Blackwell", "NVIDIA RTX 50, RTX PRO 6000 Blackwell", _BLACKWELL, _CUTLASS),
        _arch("sm_121", "Blackwell", "NVIDIA DGX Spark (GB10)", _BLACKWELL, _CUTLASS),
    )
}

_JETSON_ORIN = replace(ARCHS["sm_86"], name="sm_87", title="NVIDIA Jetson Orin")


def arch_of(major: int, minor: int) -> Arch:
    """The architecture of a compute capability.

    An unknown one has its own name and only what is safe to assume: fp16, and bf16 from 8.0 on. Thor reports
    (11, 0), or (10, 1) in builds for CUDA 12 (torch ``common_cuda.py``); it is named ``sm_110`` in both.
    """
    name = "sm_110" if (major, minor) == (10, 1) else f"sm_{major}{minor}"
    if name in ARCHS:
        return ARCHS[name]
    if name == _JETSON_ORIN.name:
        return _JETSON_ORIN
    safe = ("fp16", "bf16") if major >= 8 else ("fp16",)
    title = "NVIDIA Thor" if name == "sm_110" else "unknown NVIDIA architecture"
    return _arch(
        name, "unknown", title, safe, f"not in quantport's tables: only {' and '.join(safe)} assumed"
    )
