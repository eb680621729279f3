"""Cross-compiles every Triton kernel for every architecture of a room, on any machine, and writes what came of it.

``python benchmarks/compile.py [--target sm_90] [--check]``. Every kernel of the room is traced with fake tensors, for every
scheme that it takes; what it would launch is compiled, and the matrix instruction is looked for in the machine code. The
result is ``backends/triton/quantport_triton/evidence/cuda.json``; ``--check`` compares and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are imported

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quantport.device import Arch
from quantport.host import Host
from quantport.kernel import Kernel, WeightSpec
from quantport.scheme import Scheme

FILE = Path(__file__).parents[1] / "backends/triton/quantport_triton/evidence/cuda.json"
SHAPES = ((4096, 4096), (28672, 4096))  # of Llama-3.1-8B: out, in
ROWS = (1, 16, 64, 512, 4096)


def launches(kernel: Kernel, scheme: Scheme, arch: Arch) -> list[Any]:
    """What a kernel launches for a scheme over all shapes and rows, each specialization once."""
    from quantport_triton.launch import traced

    with FakeTensorMode(), traced(arch.name) as found:
        for n, k in SHAPES:
            spec = WeightSpec(scheme, n, k)
            stored = {key: torch.empty(shape, dtype=dtype, device="cuda") for key, (shape, dtype) in scheme.layout(n, k).items()}
            packed = kernel.pack(stored, spec)
            for m in ROWS:
                kernel.run(torch.empty(m, k, dtype=arch.compute, device="cuda"), packed, None, spec)
    return list(dict.fromkeys(found))


@cache
def compiled(launch: Any, arch: str) -> Any:
    """One launch compiled; several schemes share many."""
    from quantport_triton.evidence.machine_code import compile_for

    return compile_for(launch, "cuda", arch)


def entry(kernel: Any, scheme: Scheme, arch: Arch) -> dict[str, Any]:
    """The evidence for one kernel, scheme and architecture."""
    made = {launch.name: compiled(launch, arch.name) for launch in launches(kernel, scheme, arch)}
    refused = {name: c.because for name, c in made.items() if c.because}
    found = sorted({i for c in made.values() for i in c.instructions})
    outcome = "native"
    if refused:
        outcome = "refused"
    elif any(c.dots and not c.instructions for c in made.values()):
        outcome = "no matrix instruction"
    elif not all(i.startswith(kernel.matrix) for i in found):
        outcome = "up-cast"
    return {
        "outcome": outcome,
        "instruction": ", ".join(found),
        **({"because": next(iter(refused.values()))} if refused else {}),
        "launches": {
            name: {"instruction": ", ".join(c.instructions), "shared": c.shared, "spills": c.spills} for name, c in made.items()
        },
    }


def of_target(name: str) -> dict[str, dict[str, Any]]:
    """Family -> scheme -> entry for one architecture."""
    host = Host(only=["cuda"])
    out: dict[str, dict[str, Any]] = {}
    for kernel in host.kernels("cuda"):
        for scheme in host.schemes.values() if hasattr(kernel, "family") else ():
            if kernel.serves(scheme):
                out.setdefault(kernel.family, {})[scheme.name] = entry(kernel, scheme, host.backends["cuda"].archs[name])
    return out


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Paths at which two trees of plain data differ."""
    for key in sorted({*old, *new}):
        a, b, here = old.get(key), new.get(key), f"{path}/{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, here)
        elif a != b:
            yield f"{here}: {a} on file, {b} now"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the evidence, or compares it with what is on file."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", help="only this architecture (repeat for more)")
    parser.add_argument("--check", action="store_true", help="compare with the file, and write nothing")
    args = parser.parse_args(arguments)
    targets = args.target or list(Host(only=["cuda"]).backends["cuda"].archs)
    filed = json.loads(FILE.read_text()) if FILE.is_file() else {"targets": {}}
    with ProcessPoolExecutor(min(len(targets), os.cpu_count() or 1)) as pool:
        made = dict(zip(targets, pool.map(of_target, targets), strict=True))
    if args.check:
        old = {name: filed["targets"].get(name, {}) for name in targets}
        lines = list(differences(old, made)) + list(differences({"triton": filed.get("triton")}, {"triton": triton.__version__}))
        print("\n".join(lines) or f"fresh: {', '.join(targets)}")
        return bool(lines)
    result = {"triton": triton.__version__, "targets": {**filed["targets"], **made}}
    FILE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, families in made.items():
        for family, schemes in families.items():
            outcomes = {outcome: sum(e["outcome"] == outcome for e in schemes.values()) for outcome in {e["outcome"] for e in schemes.values()}}
            print(name, family, outcomes, sorted({e["instruction"] for e in schemes.values()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
