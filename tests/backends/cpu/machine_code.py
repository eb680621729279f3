"""Compiles kernels for one processor, which need not be this one, and prints what their machine code holds,
as JSON.

    NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2,+fma,+f16c python tests/backends/cpu/machine_code.py
    [--all] [--arm]

``--arm``: the code is written without an instruction of x86, and compiled for 64-bit Arm. ``--objects DIR``
keeps the object files.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import llvmlite.binding as llvm

from quantport_cpu.jit import (
    blocks,
    digits,
    dots,
    encode,
    floats,
    gguf,
    grid,
    grouped,
    kquants,
    machine,
    nibbles,
    q6k,
    repack,
    search,
)
from quantport_cpu.jit.frame import Kernel

ARM = ("aarch64-linux-gnu", "generic", "+neon,+fp-armv8")


def kernels(whole: bool) -> Iterator[tuple[str, Kernel]]:
    """A kernel for each kind of code, or every kernel."""
    yield from {
        "dots.fp8": dots.fp8_kernel,
        "dots.int8": dots.int8_kernel,
        "nibbles.int4": nibbles.int4_kernel,
        "floats.nf4": floats.kernel("nf4", floats.F32_SCALE, 64),
        "blocks.e2m1": blocks.kernel("e2m1", 16, blocks.E4M3, True),
        "encode": encode.kernel,
        "q4_k": kquants.kernel("q4_k"),
    }.items()
    if not whole:
        return
    yield from {
        "digits": digits.kernel,
        "repack": repack.kernel,
        "grid": grid.kernel,
        "q6_k": q6k.kernel,
        "dual": search.dual_kernel,
        "tops": blocks.tops_kernel,
        "gguf.q4_0": gguf.kernel("q4_0"),
        "gguf.q8_0": gguf.kernel("q8_0"),
        "q5_k": kquants.kernel("q5_k"),
        "grouped.fp8": grouped.fp8_kernel,
        "grouped.int8": grouped.int8_kernel,
        "grouped.int4": grouped.int4_kernel,
    }.items()
    for name in ("e2m1", "e3m2", "e2m3", "e4m3fn", "fp4", "nf4"):
        for scale, group in ((floats.E8M0, 32), (floats.E4M3, 16), (floats.F32_SCALE, 64), (floats.DUAL, 32)):
            yield f"floats.{name}.{scale}", floats.kernel(name, scale, group)
        for scale, group in ((blocks.E8M0, 32), (blocks.E4M3, 16), (blocks.F32_SCALE, 64)):
            if name not in ("fp4", "nf4") or scale == blocks.F32_SCALE:
                yield f"blocks.{name}.{scale}", blocks.kernel(name, group, scale, False)


def retargeted(text: str, target: tuple[str, str, str]) -> str:
    """Assembly of LLVM for another processor."""
    layout = str(machine.machine(*target).target_data)
    text = re.sub(r'target triple = ".*"', f'target triple = "{target[0]}"', text)
    return re.sub(r'target datalayout = ".*"', f'target datalayout = "{layout}"', text)


def described(native: str) -> dict[str, object]:
    """What the machine code calls, the widest registers that it names, and how often each instruction of
    vectors is there.
    """
    lines = [line.split("#")[0].split("//")[0].strip() for line in native.splitlines()]
    code = [line for line in lines if line and not line.endswith(":") and not line.startswith(".")]
    called = {
        m for line in code for m in re.findall(r"(?:movabsq\s+\$|\bbl\s+|callq?\s+\*?)([A-Za-z_]\w*)", line)
    }
    words = [line.removeprefix("{vex}").split()[0] for line in code]
    return {
        "calls": sorted(name for name in called if not name.startswith(("_ZN", "kernel"))),
        "zmm": any("%zmm" in line for line in code),
        "instructions": {word: words.count(word) for word in sorted(set(words))},
    }


def main() -> None:
    """Prints a line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--arm", action="store_true")
    parser.add_argument("--objects", type=Path)
    args = parser.parse_args()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    found = {}
    if args.arm:
        # numba also compiles for this processor as if it had no instructions for halves; nobody calls it.
        for name in ("__extendhfsf2", "__truncsfhf2"):
            llvm.add_symbol(name, 1)
    for name, kernel in kernels(args.all):
        text = machine.assembly(kernel.body)
        foreign = "llvm.x86." in text
        compiler = machine.machine(*ARM) if args.arm else machine.machine()
        module = llvm.parse_assembly(retargeted(text, ARM) if args.arm else text)
        found[name] = {"foreign": foreign, **described(compiler.emit_assembly(module))}
        if args.objects:
            (args.objects / f"{name}.o").write_bytes(compiler.emit_object(module))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
