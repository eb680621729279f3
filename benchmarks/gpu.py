"""Checks the GPU kernels against the reference and measures them: one command, eight minutes, one GPU.

Writes ``benchmarks/results/<device>.json`` after every stage, and from it a page and a plot. Each stage is a process of its own
with a time limit: one that fails, hangs or runs out of time is ``not measured`` with the reason, and the others go on.

    python benchmarks/gpu.py                                      # everything
    python benchmarks/gpu.py --evidence                           # and backends/cuda/quantport_cuda/tuned/<arch>.json
    python benchmarks/gpu.py --render benchmarks/results/X.json   # page and plot again
    TRITON_INTERPRET=1 python benchmarks/gpu.py --smoke           # the same code without a GPU, tiny; writes to a temporary folder
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_evidence import write_evidence
from gpu_page import index, render
from gpu_place import ROOT, Place, begin, one_line

RESULTS = ROOT / "benchmarks" / "results"
TOTAL = 460  # seconds: eight minutes with the start
GRACE = 4  # seconds after its time limit until a stage is killed
# Name -> module and time limit in seconds; time that a stage leaves goes to the next ones.
STAGES = {
    "limits": ("gpu_limits", 20),
    "checks": ("gpu_checks", 125),
    "bits": ("gpu_bits", 30),
    "models": ("gpu_models", 50),
    "linear": ("gpu_linear", 100),
    "quantize": ("gpu_quantize", 25),
    "load": ("gpu_load", 62),
    "decode": ("gpu_decode", 48),
}
Data = dict[str, Any]


def write(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def save(path: Path, data: Any) -> None:
    """Writes JSON, whole or not at all."""
    write(path, json.dumps(data, indent=1) + "\n")


def read(path: Path) -> Data:
    """The JSON that a stage wrote; empty where it wrote none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def stage(name: str, args: argparse.Namespace, previous: Data, seconds: float, folder: Path) -> Data:
    """Runs a stage in a process of its own, and returns what it had written when it ended or was killed."""
    out, before = folder / f"{name}.json", folder / f"{name}.before.json"
    save(before, previous)
    start = time.monotonic()
    options = {"--stage": name, "--until": str(start + seconds), "--out": str(out), "--previous": str(before)}
    command = [
        sys.executable,
        __file__,
        *(word for pair in options.items() for word in pair),
        *["--smoke"] * args.smoke,
    ]
    process = subprocess.Popen(command, start_new_session=True)
    why = ""
    try:
        code = process.wait(seconds + GRACE)
        why = f"the process ended with {code}" if code else ""
    except subprocess.TimeoutExpired:
        why = f"it did not end within {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the stage and what it started
            process.wait()
    result = read(out)
    if why and not result.get("missing"):
        result["missing"] = why
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def run_stage(args: argparse.Namespace) -> None:
    """Runs a stage in this process. Its time limit is on the clock that all processes of the machine share."""
    begin(args.smoke)
    place = Place(args.smoke, args.until)
    result: Data = {}

    def keep(part: Data) -> None:
        result.update(part)
        save(args.out, result)

    try:
        place.enter()
        importlib.import_module(STAGES[args.stage][0]).run(place, read(args.previous), keep)
    except Exception as error:  # a stage that fails says why, and the next one runs
        if os.environ.get("QUANTPORT_BENCH_RAISE"):
            raise
        keep({"missing": one_line(error)})


def pages(path: Path, data: Data) -> None:
    """Writes the page and the plot beside the JSON."""
    page, plot = render(data)
    write(path.with_suffix(".md"), page)
    write(path.with_suffix(".svg"), plot)
    if path.parent == RESULTS:
        write(RESULTS / "gpu.md", index(RESULTS))


def measure(args: argparse.Namespace) -> Path:
    """Runs every stage; returns the path of the JSON."""
    start = time.monotonic()
    begin(args.smoke)
    place = Place(args.smoke, start + args.total)
    data: Data = {"kind": "gpu", "run": place.describe()}
    slug = re.sub(r"[^a-z0-9]+", "-", data["run"]["device"].lower()).strip("-")
    path = (Path(tempfile.mkdtemp(prefix="quantport-smoke-")) if args.smoke else RESULTS) / f"{slug}.json"
    path = args.out.resolve() if args.out else path
    scale, due = args.total / TOTAL, start
    with tempfile.TemporaryDirectory() as folder:
        for name, (_, seconds) in STAGES.items():
            due += seconds * scale
            left = due - time.monotonic()
            if args.only and name not in args.only:
                data[name] = {"missing": "not asked for"}
            elif left < 3:
                data[name] = {"missing": "out of time"}
            else:
                print(f"{name}: {left:.0f} s at most", flush=True)
                data[name] = stage(name, args, data, left, Path(folder))
                print(f"{name}: {data[name]['seconds']} s {data[name].get('missing', '')}", flush=True)
            save(path, data)
            pages(path, data)
    importlib.import_module("gpu_load").clear()
    data["run"]["seconds"] = round(time.monotonic() - start)
    save(path, data)
    pages(path, data)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="without a GPU, tiny; needs TRITON_INTERPRET=1")
    parser.add_argument(
        "--only", nargs="+", choices=list(STAGES), help="these stages; the others are not measured"
    )
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for all stages")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument(
        "--render", type=Path, metavar="FILE", help="page and plot (and evidence) of a JSON that is there"
    )
    parser.add_argument("--evidence", action="store_true", help="write the measured evidence of the room")
    parser.add_argument(
        "--tune", type=float, metavar="SECONDS", help="search configurations of the Triton kernels, and end"
    )
    for name, kind in (("--stage", str), ("--previous", Path), ("--until", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.render and args.smoke != (os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("TRITON_INTERPRET=1 and --smoke go together: a GPU is measured without either")
    if args.render:
        pages(args.render.resolve(), read(args.render))
        if args.evidence:
            print(write_evidence(args.render, read(args.render), save))
    elif args.stage:
        run_stage(args)
    elif args.tune:
        begin(args.smoke)
        place = Place(args.smoke, time.monotonic() + args.tune)
        place.enter()
        print(importlib.import_module("gpu_tune").run(place, args.out))
    else:
        try:
            path = measure(args)
        except LookupError as error:
            sys.exit(f"{error}; without a GPU: TRITON_INTERPRET=1 python benchmarks/gpu.py --smoke")
        if args.evidence and not args.smoke:
            print(write_evidence(path, read(path), save))
        print(path.with_suffix(".md").read_text(encoding="utf-8"))
        wrong = {name: n for name in STAGES if (n := read(path)[name].get("failed"))}
        sys.exit(f"{path}: wrong on this device: {wrong}" if wrong else None)


if __name__ == "__main__":
    main()
