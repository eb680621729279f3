"""Kernels of the CPU room."""

from __future__ import annotations

from quantport.backend import Kernel, aten
from quantport_cpu.kernels.bf16 import CpuBf16, CpuBf16AsFp32
from quantport_cpu.kernels.blocks import CpuBlocks
from quantport_cpu.kernels.fp8 import CpuFp8WeightOnly
from quantport_cpu.kernels.gguf import CpuGguf, CpuGgufInt8
from quantport_cpu.kernels.int4 import CpuInt4, CpuInt4Int8
from quantport_cpu.kernels.int8 import CpuInt8, CpuInt8WeightOnly
from quantport_cpu.kernels.int8_groups import CpuInt8Groups


def kernels() -> tuple[Kernel, ...]:
    """Every kernel of the room."""
    return (
        CpuInt8(),
        CpuInt8WeightOnly(),
        CpuInt8Groups(),
        CpuFp8WeightOnly(),
        CpuInt4Int8(),
        CpuInt4(),
        CpuBlocks(),
        CpuGgufInt8(),
        CpuGguf(),
        CpuBf16(),
        CpuBf16AsFp32(),
        *aten.portable(),
    )
