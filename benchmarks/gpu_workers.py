"""Spreads the items of a stage over processes, since most of the time is compilation. Triton's cache is shared by all."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_place import Place, begin, one_line, weight

Row = dict[str, Any]
LAST_START = 5  # seconds before the end, after which no process starts an item
MAX_PROCESSES = 12  # each holds a context of the device, and the largest weight in fp32


def guarded(place: Place, module: Any, item: Any) -> Iterator[Row]:
    """The rows of an item; where time or memory is short or it raises, one row with the reason."""
    none = module.row(item)
    if place.over(LAST_START):
        yield {**none, "skipped": "out of time"}
        return
    try:
        yield from module.rows(place, item)
    except torch.OutOfMemoryError:  # beside the other processes
        yield {**none, "skipped": "out of memory"}
    except Exception as error:  # the others go on
        yield {**none, "ok": False, "failure": one_line(error)}


def work(place: Place, name: str, part: int, parts: int, out: Path) -> None:
    """Runs every ``parts``-th item of a stage from ``part`` on, and writes its rows as lines of JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(part)
    module: Any = importlib.import_module(name)
    with out.open("w", encoding="utf-8") as file, torch.no_grad():
        for item in module.items(place)[part::parts]:
            for row in guarded(place, module, item):
                file.write(json.dumps(row) + "\n")
                file.flush()
            weight.cache_clear()
            if not place.smoke:
                torch.cuda.empty_cache()


def spread(
    place: Place,
    name: str,
    summary: Callable[[list[Row]], dict[str, Any]],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Starts the processes, and keeps the summary of their rows up to date until they end or time is out."""
    parts = 1 if place.smoke else max(1, min(MAX_PROCESSES, (os.cpu_count() or 1) - 2))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.jsonl" for i in range(parts)]
        command = [sys.executable, __file__, name, str(int(place.smoke)), str(place.until), str(parts)]
        running = [subprocess.Popen([*command, str(i), str(f)]) for i, f in enumerate(files)]
        while any(p.poll() is None for p in running) and not place.over():
            time.sleep(0.2 if place.smoke else 1)
            keep(summary(gather(files)))
        late = sum(p.poll() is None for p in running)
        for process in running:
            process.kill()
        died = sum(p.wait() != 0 for p in running) - late
        counts = ((late, "did not end in time"), (died, "died"))
        why = "; ".join(f"{count} of {parts} processes {what}" for count, what in counts if count)
        keep({**summary(gather(files)), **({"missing": why} if why else {})})


def gather(files: list[Path]) -> list[Row]:
    """The complete lines of every file."""
    lines = [
        line for f in files if f.exists() for line in f.read_text(encoding="utf-8").splitlines(keepends=True)
    ]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def main() -> None:
    name, smoke, until, parts, part, out = sys.argv[1:]
    begin(bool(int(smoke)))
    work(Place(bool(int(smoke)), float(until)), name, int(part), int(parts), Path(out))


if __name__ == "__main__":
    main()
