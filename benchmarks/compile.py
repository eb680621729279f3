"""Cross-compiles every Triton kernel for every architecture of a room, on any machine, and writes the evidence.

``python benchmarks/compile.py [--target sm_90] [--all | --check]``. Every kernel of the room is traced with fake tensors, for
every scheme that it serves; what it would launch is compiled, and the matrix instructions are read from the machine code.
The result is ``backends/triton/quantport_triton/evidence/cuda.json``. An entry whose fingerprint (sources, types, constants,
version of Triton) is on file is kept, except with ``--all``. ``--check`` writes and compiles nothing, and fails where an entry is
missing, left over or stale; with ``--all`` it compiles everything and compares. With ``--filed`` a missing entry is no failure: a
scheme that was not compiled yet, such as one that is new in the core, is claimed as interpreted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are imported

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quantport.device import Arch
from quantport.kernels.base import WeightSpec
from quantport.plugins.registry import Registry
from quantport.scheme import Scheme
from quantport_triton.evidence import machine_code
from quantport_triton.launch import traced
from quantport_triton.quantize import quantize
from quantport_triton.weights import quantize_weight

FILE = Path(__file__).parents[1] / "backends/triton/quantport_triton/evidence/cuda.json"
SHAPES = ((4096, 4096), (28672, 4096))  # of Llama-3.1-8B: out, in
ROWS = (1, 16, 64, 512, 4096)
STORED = ("int4_weight_only:g128:fp16", "int4_weight_only:g128:fp32:asym")  # of GPTQ and AWQ
# Triton has no matrix instructions for them, and the code that it makes of ``tl.dot`` takes minutes to assemble.
WITHOUT_DOT = ("sm_70", "sm_75")
Entries = dict[str, dict[str, Any]]


def launches(kernel: Any, scheme: Scheme, arch: Arch) -> list[Any]:
    """What a kernel launches for a scheme over all shapes and rows, each specialization once."""
    with FakeTensorMode(), traced(arch.name) as traces:
        for n, k in SHAPES:
            spec = WeightSpec(scheme, n, k)
            stored = {
                key: torch.empty(shape, dtype=dtype, device="cuda")
                for key, (shape, dtype) in scheme.layout(n, k).items()
            }
            packed = kernel.pack(stored, spec)
            for m in ROWS:
                kernel.run(torch.empty(m, k, dtype=arch.compute, device="cuda"), packed, None, spec)
        bias = torch.empty(n, dtype=arch.compute, device="cuda")
        for m in ROWS[:2]:
            kernel.run(torch.empty(m, k, dtype=arch.compute, device="cuda"), packed, bias, spec)
    return list(dict.fromkeys(traces))


def quantizing(scheme: Scheme, arch: Arch) -> list[Any]:
    """What quantizing a weight to a scheme launches, and quantizing activations in the layouts of the vendor's libraries."""
    with FakeTensorMode(), traced(arch.name) as traces:
        for n, k in SHAPES:
            quantize_weight(torch.empty(n, k, dtype=torch.bfloat16, device="cuda"), scheme)
            for m in ROWS if scheme.activation else ():
                x = torch.empty(m, k, dtype=arch.compute, device="cuda")
                quantize(x, scheme.activation, swizzle=scheme.activation.scale in ("e8m0", "e4m3fn"))
                quantize(x, scheme.activation, transposed=scheme.activation.group_size == 128)
    return list(dict.fromkeys(traces))


@cache
def compiled(launch: Any, arch: str) -> machine_code.Compiled:
    """One launch compiled; several schemes share many."""
    return machine_code.compile_for(launch, "cuda", arch)


def entry(traces: Sequence[Any], matrix: tuple[str, ...], arch: str) -> dict[str, Any]:
    """The evidence from the launches of one kernel for one scheme."""
    results = {launch: compiled(launch, arch) for launch in traces}
    kernels = list(dict.fromkeys(launch.kernel.__name__ for launch in traces))
    refused = [c.because for c in results.values() if c.because]
    instructions = sorted({i for c in results.values() for i in c.instructions})
    outcome = "native"
    if refused:
        outcome = "refused"
    elif any(c.dots and not c.instructions for c in results.values()):
        outcome = "no matrix instruction"
    elif not all(i.startswith(matrix) for i in instructions):
        outcome = "up-cast"
    return {
        "outcome": outcome,
        "instruction": ", ".join(instructions),
        **({"because": refused[0]} if refused else {}),
        "fingerprint": machine_code.fingerprint(traces),
        "kernels": {
            name: _summary([c for launch, c in results.items() if launch.kernel.__name__ == name])
            for name in kernels
        },
    }


def _summary(results: Sequence[machine_code.Compiled]) -> dict[str, Any]:
    """The launches of one kernel: their number, matrix instructions, and the most shared memory and spills of any."""
    instructions = sorted({i for c in results for i in c.instructions})
    largest = {"shared": max(c.shared for c in results), "spills": max(c.spills for c in results)}
    return {"launches": len(results), "instruction": ", ".join(instructions), **largest}


def native(scheme: Scheme, arch: Arch) -> bool:
    """Whether the matrix unit multiplies the format of a scheme's activations."""
    return scheme.activation is not None and scheme.activation.unit in arch.native


def of_target(
    name: str, filed: Mapping[str, Any], compile_all: bool, only_trace: bool, only: str | None
) -> dict[str, Entries]:
    """Family -> scheme -> entry for one architecture; an entry that is only traced has nothing but its fingerprint."""
    host = Registry(only=["cuda"])
    arch = host.backends["cuda"].archs[name]
    kernels = [k for k in host.kernels("cuda") if hasattr(k, "family")]
    known = host.schemes.values()
    # Other options do not change the code, but those that describe the numbers of others: of these, some.
    schemes = [*known, *(s.option("double") for s in known if "double" in s.options)]
    schemes += [host.schemes[name] for name in STORED]
    work = {
        (k.family, s.name): (launches(k, s, arch), k.matrix) for k in kernels for s in schemes if k.serves(s)
    }
    not_native = {
        (k.family, s.name)
        for k in kernels
        for s in schemes
        if k.quantizes_activations and not native(s, arch)
    }
    schemes += [s.option("mse") for s in known if "mse" in s.options]
    work |= {("quantize", s.name): (traces, ()) for s in schemes if (traces := quantizing(s, arch))}
    out: dict[str, Entries] = {}
    for (family, scheme), (traces, matrix) in work.items():
        if only not in (None, family):
            continue
        old = filed.get(family, {}).get(scheme)
        new = {"fingerprint": machine_code.fingerprint(traces)}
        if name in WITHOUT_DOT and (family, scheme) in not_native:
            new |= {"outcome": "not compiled", "instruction": "", "kernels": {}}
        elif old is not None and old.get("fingerprint") == new["fingerprint"] and not compile_all:
            new = old
        elif compile_all or not only_trace:
            new = entry(traces, matrix, name)
        out.setdefault(family, {})[scheme] = new
    return out


def _filed(new: Mapping[str, Entries], old: Mapping[str, Any]) -> dict[str, Entries]:
    """The entries of ``new`` that ``old`` has too."""
    return {f: {s: e for s, e in entries.items() if s in old[f]} for f, entries in new.items() if f in old}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """What differs between two trees of plain data, one line each."""
    lines = []
    for key in sorted({*old, *new}):
        a, b, here = old.get(key), new.get(key), f"{path}/{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, here)
        elif a != b:
            lines.append(f"{here}: {a} on file, {b} now")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the evidence, or compares it with what is on file."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", help="only this architecture (repeat for more)")
    parser.add_argument("--family", help="only this family of kernels, with --check")
    parser.add_argument("--file", type=Path, default=FILE, help="another file than that of the package")
    parser.add_argument("--all", action="store_true", help="compile what is on file too")
    parser.add_argument("--check", action="store_true", help="compare with the file, and write nothing")
    parser.add_argument("--filed", action="store_true", help="only what is on file, with --check")
    args = parser.parse_args(arguments)
    if args.family and not args.check:
        parser.error("--family goes with --check: a file that is written is whole")
    targets = args.target or list(Registry(only=["cuda"]).backends["cuda"].archs)
    filed = json.loads(args.file.read_text(encoding="utf-8")) if args.file.is_file() else {"targets": {}}
    old = {name: filed["targets"].get(name, {}) for name in targets}
    if args.check and args.family:
        old = {name: {args.family: families.get(args.family, {})} for name, families in old.items()}
    work = partial(of_target, compile_all=args.all, only_trace=args.check, only=args.family)
    with ProcessPoolExecutor(min(len(targets), os.cpu_count() or 1)) as pool:
        new = dict(zip(targets, pool.map(work, targets, old.values()), strict=True))
    if args.filed:
        new = {name: _filed(families, old[name]) for name, families in new.items()}
    if args.check:
        lines = differences({"triton": filed.get("triton"), **old}, {"triton": triton.__version__, **new})
        print("\n".join(lines) or f"fresh: {', '.join(targets)}")
        return bool(lines)
    result = {"triton": triton.__version__, "targets": {**filed["targets"], **new}}
    args.file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, families in new.items():
        for family, schemes in families.items():
            outcomes = sorted({f"{e['outcome']} {e['instruction']}".strip() for e in schemes.values()})
            print(f"{name} {family}: {len(schemes)} schemes, {'; '.join(outcomes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
