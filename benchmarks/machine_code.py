"""Counts the instructions of the inner loops of the compiled CPU kernels, for processors that need not be here.

Writes ``benchmarks/results/machine_code.md``. The counts do not depend on the machine, only on numba and LLVM.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from common import describe, write

SCRIPT = Path(__file__).parent.parent / "tests" / "backends" / "cpu" / "machine_code.py"
X86 = "+avx2,+fma,+f16c"
WIDE = f"{X86},+avx512f,+avx512bw,+avx512dq,+avx512vl"
PROCESSORS = {
    "AVX2": ("haswell", X86),
    "AVX-VNNI": ("alderlake", f"{X86},+avxvnni"),
    "AVX-512": ("skylake-avx512", WIDE),
    "AVX-512 VNNI": ("cascadelake", f"{WIDE},+avx512vnni"),
    "AMX": ("sapphirerapids", f"{WIDE},+avx512vnni,+amx-tile,+amx-int8"),
    "NEON": ("generic", "+neon"),
}


def loops(processor: str) -> dict[str, list[dict[str, int]]]:
    """The inner loops of each kernel that has some."""
    name, features = PROCESSORS[processor]
    environment = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    call = [sys.executable, str(SCRIPT), *(["--arm"] if processor == "NEON" else [])]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
    kernels = json.loads(done.stdout.splitlines()[-1])
    return {kernel: code["loops"] for kernel, code in kernels.items() if code["loops"]}


def cell(found: list[dict[str, int]] | None) -> str:
    """The fewest and the most instructions for 64 products, and vectors that a loop keeps on the stack."""
    if not found:
        return ""
    rates = sorted(64 * loop["instructions"] / loop["products"] for loop in found)
    spills = sum(loop["spills"] for loop in found)
    text = f"{rates[0]:.3g}" if len(rates) == 1 else f"{rates[0]:.3g} to {rates[-1]:.3g}"
    return f"{text}, {spills} on the stack" if spills else text


def main() -> None:
    """Writes the page."""
    found = {processor: loops(processor) for processor in PROCESSORS}
    kernels = list(dict.fromkeys(kernel for by_kernel in found.values() for kernel in by_kernel))
    lines = [
        f"| `{kernel}` | " + " | ".join(cell(found[p].get(kernel)) for p in PROCESSORS) + " |"
        for kernel in kernels
    ]
    run = describe()
    write(
        "machine_code.md",
        "\n".join(
            [
                "# Instructions of the inner loops of the compiled CPU kernels",
                "",
                f"date {run['date']}, commit {run['commit']}, python {run['python']}",
                "",
                "Instructions for 64 products of a weight and an activation: the fewest, in loops that share a weight among several rows of",
                "activations, and the most, in loops for one row, or, of `gemm_int8`, `gemm_int4` and `token`, in the one that quantizes a row.",
                "Loads of vectors from the stack and stores to it are counted too.",
                "",
                "| kernel | " + " | ".join(PROCESSORS) + " |",
                "|---" * (len(PROCESSORS) + 1) + "|",
                *lines,
                "",
                "Compiled for each by numba and LLVM, on whatever machine; `tests/backends/cpu/machine_code.py` reads the code. One instruction of",
                "AMX adds 16,384 products.",
                "",
            ]
        ),
    )


if __name__ == "__main__":
    main()
