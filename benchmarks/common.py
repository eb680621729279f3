"""Shared by the benchmarks: interleaved medians, the description of a run, and tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def cpu_name() -> str:
    """Model name of the processor, from the system."""
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


def describe() -> dict[str, str]:
    """Device, date, commit and versions of this run."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    restricted = os.environ.get("NUMBA_CPU_NAME")  # by ci/as-cpu
    return {
        "device": cpu_name() + (f", restricted to what a {restricted} has" if restricted else ""),
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
    }


def interleaved(
    calls: Mapping[str, Callable[[int], object]], rounds: int = 9, seconds: float = 0.08
) -> dict[str, float]:
    """Median seconds of one call of each, all measured in turn in every round.

    Args:
        calls: Functions of a running number, by which they can rotate through copies.
        rounds: Number of rounds.
        seconds: Approximate time of each call's share of a round.
    """
    counts: dict[str, int] = {}
    for name, call in calls.items():
        call(0)
        start = time.perf_counter()
        call(1)
        counts[name] = max(2, min(200, int(seconds / (time.perf_counter() - start + 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    turn = 2
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for i in range(counts[name]):
                call(turn + i)
            times[name].append((time.perf_counter() - start) / counts[name])
            turn += counts[name]
    return {name: statistics.median(t) for name, t in times.items()}


def markdown(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], notes: Sequence[str] = ()
) -> str:
    """A page with the run's description, one table and notes."""
    run = ", ".join(f"{k} {v}" for k, v in describe().items())
    lines = [f"# {title}", "", run, "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(c) for c in row) + " |" for row in rows]
    return "\n".join([*lines, "", *notes, ""])


def lines_of_json(data: Mapping[str, Any]) -> str:
    """JSON with one line for each row, so that it is small and its differences can be read."""
    parts = []
    for key, value in data.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write(name: str, text: str) -> None:
    """Writes a results page and prints it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / name).write_text(text, encoding="utf-8")
    print(text)
