"""What each class of host processor multiplies natively.

Sources: oneDNN ``doc/common_concepts/data_types.md`` and ``dev_guide_int8_computations``; Intel's intrinsics
guide for ``vpmaddwd``, which sums two products of int16 in an int32, exactly for bytes, where ``vpmaddubsw``
saturates.
"""

from __future__ import annotations

from quantport.backend import Arch

_ONEDNN = "oneDNN doc/common_concepts/data_types.md"


def _arch(name: str, title: str, *native: str) -> Arch:
    return Arch("cpu", name, title, frozenset(native), _ONEDNN, family="CPU")


ARCHS = {
    arch.name: arch
    for arch in (
        _arch("generic", "any processor"),
        _arch("x86_avx2", "x86-64 with AVX2", "int8"),
        _arch("x86_avx512", "x86-64 with AVX-512, without VNNI", "int8"),
        _arch("x86_vnni", "x86-64 with AVX512-VNNI or AVX2-VNNI", "int8"),
        _arch("x86_bf16", "x86-64 with AVX512-BF16 and VNNI", "int8", "bf16"),
        _arch("x86_amx", "x86-64 with AMX-INT8 and AMX-BF16", "int8", "bf16"),
        _arch("arm", "64-bit Arm with NEON"),
        _arch("arm_i8mm", "64-bit Arm with I8MM and BF16", "int8", "bf16"),
    )
}
