"""Reading quantized checkpoints of about 0.9 billion weights: kept beside a copy of their bytes, converted beside quantizing the
same model from BF16, and the memory that either takes.

Each case runs in a process of its own, its steps in turn; times are medians over rounds. The peak is as in `load_memory`.
Must reach: kept within 1.1 times the copy, its bytes and 0.5 GiB; converted within 1.5 times from BF16. Writes
``benchmarks/results/checkpoints.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import markdown, write
from load import GIB, make, read_and_copy, status
from load_memory import ALLOWED, peak_of

import quantport
from quantport.loading.executor import give_back

CASES = {
    "compressed-tensors": ("int8", "int4_weight_only", "fp8_per_channel", "mxfp4_weight_only"),
    "fp8": ("fp8_per_block",),
    "mxfp8": ("mxfp8",),
    "gptq": ("int4_weight_only:fp16",),
    "awq": ("int4_weight_only:fp16",),
    "modelopt": ("fp8_per_channel",),
}
TARGET = "int8_weight_only"  # of what is converted
OTHER = "int4_weight_only"  # where that is what is stored


def child(folder: Path, stored: Path, rounds: int) -> dict[str, float]:
    """All steps, in this process: median seconds, and peaks in bytes beside what stays."""
    plan = quantport.plan(stored)
    is_int8 = plan.quantized[0].requested_scheme.startswith("int8")
    target = OTHER if is_int8 else TARGET
    steps = {
        "copy": partial(read_and_copy, stored),
        "keep": partial(quantport.load, stored),
        "convert": partial(quantport.load, stored, target),
        "quantize": partial(quantport.load, folder, target),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():  # imports and compilation are no load
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    found: dict[str, float] = {name: statistics.median(t) for name, t in times.items()}
    for name in ("keep", "convert"):
        give_back()
        base = status("VmRSS")
        model, peak = peak_of(steps[name])
        found[f"{name} peak"] = peak - base - model.quantport_plan.after
        del model
    return {**found, "bytes": plan.before}


def row(folder: Path, name: str, scheme: str, rounds: int) -> list[str]:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        stored = Path(scratch) / "stored"
        quantport.save(quantport.load(folder, scheme), stored, format=name)
        words = ["--child", "--folder", folder, "--stored", stored, "--rounds", rounds]
        command = [sys.executable, __file__, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    kept, converted = found["keep"] / found["copy"], found["convert"] / found["quantize"]
    peaks = [found[f"{step} peak"] for step in ("keep", "convert")]
    return [
        name,
        scheme,
        f"{found['bytes'] / GIB:.2f}",
        f"{kept:.2f} {'✅' if kept <= 1.1 else '❌'}",
        f"{converted:.2f} {'✅' if converted <= 1.5 else '❌'}",
        *(f"{peak / GIB:.2f} {'✅' if peak <= ALLOWED else '❌'}" for peak in peaks),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--stored", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--formats", nargs="*", default=list(CASES))
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.folder, options.stored, options.rounds)))
        return
    rows: list[Any] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make(folder, layers=options.layers)
        for name in options.formats:
            for scheme in CASES[name]:
                rows.append(row(folder, name, scheme, options.rounds))
                print(rows[-1], flush=True)
    columns = ("format", "scheme", "GiB", "kept, x copy", "converted, x from BF16")
    more = ("kept: GiB beside it", "converted: GiB beside it")
    notes = [
        f"Converted to `{TARGET}`, or to `{OTHER}` where int8 is stored. `copy` reads every tensor into memory once. Medians of "
        f"{options.rounds} rounds."
    ]
    write("checkpoints.md", markdown("Reading quantized checkpoints", (*columns, *more), rows, notes))


if __name__ == "__main__":
    main()
