"""The processor that kernels are compiled for: the one that numba compiles for.

``NUMBA_CPU_NAME`` and ``NUMBA_CPU_FEATURES`` restrict it. Code is chosen by instruction sets, never by the
name of a processor, and only by those that are listed: an empty ``NUMBA_CPU_FEATURES`` promises nothing,
whatever the processor of that name has.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numba.core.codegen
import numba.core.config

AVX2 = ("avx2", "fma", "f16c")
AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
X86 = ("x86_64", "amd64")


class Target(NamedTuple):
    """A processor.

    Attributes:
        name: LLVM's name of it.
        listed: Instruction sets that it has (+) and lacks (-), as LLVM lists them.
        is_x86: Whether it is an x86 at all.
    """

    name: str
    listed: str
    is_x86: bool

    @property
    def features(self) -> frozenset[str]:
        """Instruction sets that it has."""
        return frozenset(word[1:] for word in self.listed.split(",") if word.startswith("+"))

    def has(self, *features: str) -> bool:
        """Whether it is an x86 with all of these."""
        return self.is_x86 and self.features.issuperset(features)

    @property
    def dot_bits(self) -> int:
        """Bits of the vectors of the instruction that adds four products u8 x s8 to each int32.

        512, 256, or 0 without VNNI.
        """
        if self.has(*AVX512, "avx512vnni"):
            return 512
        return 256 if self.has("avx2", "avxvnni") else 0

    @property
    def pair_bits(self) -> int:
        """Bits of the vectors of the instruction that adds two products of int16: 512, 256 or 0."""
        return 512 if self.has(*AVX512) else 256 if self.has("avx2") else 0

    @property
    def lookup_bits(self) -> int:
        """Bits of the fp32 vectors that one instruction permutes by indices: 512, 256 or 0."""
        return self.pair_bits

    @property
    def accumulators(self) -> int:
        """How many sums of 16 fp32 stay in registers, beside what is added to them."""
        return 16 if self.has(*AVX512) else 4

    @property
    def missing(self) -> str:
        """Which instruction sets kernels need and it lacks, as a sentence; '' where they run."""
        lacking = [f.upper() for f in AVX2 if self.is_x86 and not self.has(f)]
        return (
            f"the compiled kernels need AVX2, FMA and F16C: {self.name} has no {', '.join(lacking)}"
            if lacking
            else ""
        )


@cache
def host_target() -> Target:
    """The processor that numba compiles for in this process."""
    config: Any = numba.core.config
    restricted = config.CPU_FEATURES
    listed = str(numba.core.codegen.get_host_cpu_features() if restricted is None else restricted)
    return Target(config.CPU_NAME or llvm.get_host_cpu_name(), listed, platform.machine().lower() in X86)
