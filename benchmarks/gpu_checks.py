"""Every kernel of the room against the reference on the device, for every scheme that it accepts. Run by several processes at a
time, since most of it is compiling; what they compile is in Triton's cache for the stages that measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_place import Place, begin, told, weight
from gpu_targets import ROWS, SHAPES

Row = dict[str, Any]
SMOKE = ("int4_weight_only", "fp8_per_channel", "fp8_per_block", "int8", "nf4", "nvfp4_weight_only", "mxfp4")
OPTIONS = ("nf4:double", "fp4:double", "mxfp4:mse", "nvfp4:mse", "int4_weight_only:hadamard")
FEW = (1, 2, 16, 17, 64, 257)
ODD = ((160, 256), (67, 200), (1024, 1408))  # of whole blocks, of none, and of a small model
TIMED = (
    "fp8_per_channel", "fp8_per_tensor", "fp8_per_block", "int8", "int4_weight_only", "int8_weight_only", "fp8_weight_only", "nf4",
    "mxfp4_weight_only", "nvfp4_weight_only", "mxfp8", "mxfp4", "nvfp4",
)  # fmt: skip


class Case(NamedTuple):
    """One weight and one dtype; every kernel that accepts it runs at each number of rows."""

    scheme: str
    shape: tuple[int, int]
    dtype: torch.dtype
    rows: tuple[int, ...]


def cases(place: Place) -> list[Case]:
    """Small shapes in every dtype for every scheme, then the shapes and rows that are measured."""
    from quantport.host import host

    names = [n for n in host().schemes if n != "bf16"] + list(OPTIONS)
    if place.smoke:
        return [Case(n, (32, 160), place.dtypes[0], (1, 17)) for n in SMOKE]
    small = [Case(n, s, d, FEW) for s in ODD for d in place.dtypes for n in names]
    first = [Case(n, SHAPES[0], place.dtypes[0], ROWS) for n in TIMED]
    return first + small + [Case(n, s, place.dtypes[0], ROWS) for s in SHAPES[1:] for n in TIMED]


def check(place: Place, case: Case) -> Iterator[Row]:
    """The rows of one case. The reference is ``numerics.linear`` in fp32 on the same device, TF32 off."""
    from quantport import numerics
    from quantport.capability import Accepted
    from quantport.host import host
    from quantport.kernel import Request, WeightSpec

    scheme, (n, k) = host().schemes[case.scheme], case.shape
    spec = WeightSpec(scheme, n, k)
    big = case.shape in SHAPES  # torch's own operators are checked at small shapes, where they are quick
    kernels = [x for x in place.kernels if not (big and x.name.startswith("torch."))]
    taken = [x for x in kernels if isinstance(x.verdict(Request(spec, "linear", place.device, case.dtype)), Accepted)]
    if not taken:
        return
    dense = weight(n, k, case.dtype, place.torch)
    stored = numerics.quantize_weight(dense, scheme, fast=host().backends[place.device.kind].quantize_weight)
    bias = torch.randn(n, device=place.torch).to(case.dtype)
    for m in case.rows:
        x = torch.randn(m, k, device=place.torch).to(case.dtype)
        x[0, :: max(1, k // 3)] *= 20  # outliers
        expected = {
            full: numerics.linear(x, stored, scheme if full else scheme.weight_only, bias).float()
            for full in {kernel.quantizes_activations for kernel in taken}
        }
        for kernel in taken:
            told_case = f"{n}x{k}, M={m}, {str(case.dtype).removeprefix('torch.')}"
            row: Row = {"kernel": kernel.name, "scheme": case.scheme, "case": told_case, "tolerance": kernel.tolerance}
            try:
                y = kernel.apply(x, kernel.pack(stored, spec), bias, spec).float()
                want = expected[kernel.quantizes_activations]
                row["error"] = ((y - want).abs().max() / want.abs().max()).item()
                row["ok"] = y.shape == want.shape and row["error"] <= kernel.tolerance  # a NaN is not ok
            except Exception as error:
                row |= {"ok": False, "failure": told(error)}
            yield row


def worker(place: Place, part: int, parts: int, out: Path) -> None:
    """Every ``parts``-th case, from ``part`` on, written line by line."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(part)
    with out.open("w", encoding="utf-8") as file:
        for case in cases(place)[part::parts]:
            for row in guarded(place, case):
                file.write(json.dumps(row) + "\n")
                file.flush()
            weight.cache_clear()
            if not place.smoke:
                torch.cuda.empty_cache()


def guarded(place: Place, case: Case) -> Iterator[Row]:
    """The rows of a case; one row that says why where there is no time, or the reference fails."""
    none: Row = {"kernel": "every kernel", "scheme": case.scheme, "case": f"{case.shape}, {case.dtype}"}
    if place.over(2):
        yield {**none, "skipped": "out of time"}
        return
    try:
        yield from check(place, case)
    except torch.OutOfMemoryError:  # beside the other processes
        yield {**none, "skipped": "out of memory"}
    except Exception as error:
        yield {**none, "ok": False, "failure": told(error)}


def run(place: Place, found: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """Starts the workers and gathers what they wrote."""
    parts = 1 if place.smoke else max(1, min(8, (os.cpu_count() or 1) - 2))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.jsonl" for i in range(parts)]
        arguments = [sys.executable, __file__, str(int(place.smoke)), str(place.until)]
        running = [subprocess.Popen([*arguments, str(i), str(parts), str(f)]) for i, f in enumerate(files)]
        while any(p.poll() is None for p in running) and not place.over(-2):
            time.sleep(0.2 if place.smoke else 1)
            keep(summary(gather(files)))
        late = sum(p.poll() is None for p in running)
        for process in running:
            process.kill()
        died = sum(p.wait() != 0 for p in running) - late
        told_ = [f"{late} of {parts} processes did not end in time"] * bool(late) + [f"{died} of {parts} processes died"] * bool(
            died
        )
        keep({**summary(gather(files)), **({"missing": "; ".join(told_)} if told_ else {})})


def summary(rows: list[Row]) -> dict[str, Any]:
    """A row for each kernel and scheme: cases, largest error, and what failed."""
    out: dict[tuple[str, str], Row] = {}
    for row in rows:
        one = out.setdefault(
            (row["kernel"], row["scheme"]),
            {"kernel": row["kernel"], "scheme": row["scheme"], "cases": 0, "failures": [], "skipped": 0},
        )
        if row.get("skipped"):
            one["skipped"] += 1
            continue
        one["cases"] += 1
        if "error" in row:
            one |= {"error": max(row["error"], one.get("error", 0.0)), "tolerance": row["tolerance"]}
        if not row["ok"]:
            one["failures"].append(f"{row['case']}: {row.get('failure') or format(row['error'], '.1e')}")
    return {"rows": list(out.values()), "failed": sum(bool(r["failures"]) for r in out.values())}


def gather(files: list[Path]) -> list[Row]:
    """Whole lines of every file."""
    lines = [line for f in files if f.exists() for line in f.read_text(encoding="utf-8").splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def main() -> None:
    smoke, until, part, parts, out = sys.argv[1:]
    begin(bool(int(smoke)))
    worker(Place(bool(int(smoke)), float(until)), int(part), int(parts), Path(out))


if __name__ == "__main__":
    main()
