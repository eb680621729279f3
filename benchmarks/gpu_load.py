"""Loads a synthetic BF16 checkpoint of the 8B shape to the device: ``quantport.load``, and a mere copy of its tensors."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from gpu_llama import TINY, Sizes, tree
from gpu_place import Place, one_line
from gpu_targets import LOADED

ROUNDS = 3
# The id of the process that started the stage follows: it removes the folders of a stage that it killed.
PREFIX = "quantport-bench-"


def home(size: int) -> Path:
    """A folder with room for the checkpoint: in memory where there is enough, else on disk."""
    for place in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        if (
            place.is_dir()
            and shutil.disk_usage(place).free > 1.5 * size
            and (place.name != "shm" or _free() > 2.5 * size)
        ):
            return place
    raise OSError(f"no folder has {1.5 * size / 1e9:.0f} GB free")


def clear() -> None:
    """Removes the checkpoints of stages that this process started; a stage that was killed could not."""
    for place in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        for directory in place.glob(f"{PREFIX}{os.getpid()}-*"):
            shutil.rmtree(directory, ignore_errors=True)


def _free() -> int:
    """Bytes of available memory."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def make(directory: Path, sizes: Sizes) -> None:
    """Writes the checkpoint: random BF16 numbers, repeated, in shards."""
    from quantport.checkpoint import save_tensors

    block = torch.randn(1 << 24).mul_(0.02).bfloat16()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in sizes.shapes().items():
            yield name, block.repeat(-(-prod(shape) // block.numel()))[: prod(shape)].view(shape)

    save_tensors(directory, tensors(), max_shard_bytes=5 * 10**9)


def copying(place: Place, directory: Path) -> dict[str, float]:
    """The limit: reads every tensor and copies it to the device, as many at a time as loading does."""
    from quantport.checkpoint import Checkpoint
    from quantport.loading.executor import Task, run_tasks

    kept = []
    with Checkpoint.open(directory) as checkpoint:

        def copy(name: str) -> None:
            kept.append(checkpoint.read(name).to(place.torch, copy=True))
            checkpoint.release(name)

        run_tasks([Task(n, t.nbytes, lambda n=n: copy(n)) for n, t in checkpoint.tensors.items()])  # type: ignore[misc]  # a default
    return {"final": sum(t.nbytes for t in kept)}


def loading(place: Place, directory: Path, sizes: Sizes, scheme: str) -> dict[str, float]:
    """Runs ``quantport.load``; on a GPU the peak of allocated memory is measured too."""
    import quantport

    before = 0
    if not place.smoke:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place.torch)
        before = torch.cuda.memory_allocated(place.torch)
    device = "cpu" if place.smoke else place.device
    model = quantport.load(directory, scheme, device=device, model=lambda: tree(sizes.shapes()))
    plan = model.quantport_plan
    out = {"final": plan.after, "allowed_GiB": plan.peak / (1 << 30)}
    if not place.smoke:
        peak = torch.cuda.max_memory_allocated(place.torch) - before
        out |= {"peak_GiB": peak / (1 << 30), "peak_ratio": peak / plan.peak}
    return out


def measure(place: Place, call: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The results of a call, and its seconds."""
    start = time.perf_counter()
    results = call()
    place.synchronize()
    return {**results, "seconds": time.perf_counter() - start}


def run(place: Place, previous: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """Runs copying and every scheme in turn, in rounds while there is time. With several rounds the first one only warms up."""
    sizes = TINY if place.smoke else Sizes()
    size = 2 * sum(prod(s) for s in sizes.shapes().values())
    directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getppid()}-", dir=home(size)))
    try:
        start = time.perf_counter()
        make(directory / "model", sizes)
        keep(
            {
                "rows": [],
                "written_in": time.perf_counter() - start,
                "where": str(directory.parent),
                "bytes": size,
            }
        )
        cases: dict[str, Callable[[], dict[str, float]]] = {
            "copying BF16": lambda: copying(place, directory / "model")
        }
        cases |= {s: (lambda s=s: loading(place, directory / "model", sizes, s)) for s in LOADED}  # type: ignore[misc]  # a default
        _rounds(place, cases, size, keep)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _rounds(
    place: Place,
    cases: dict[str, Callable[[], dict[str, float]]],
    size: int,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    times: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    failed: dict[str, str] = {}
    longest = 0.0
    for _ in range(1 if place.smoke else ROUNDS):
        for name, call in cases.items():
            if name in failed or place.over(1.5 * longest):
                continue
            try:
                times[name].append(measure(place, call))
                longest = max(longest, times[name][-1]["seconds"])
            except Exception as error:  # the others go on
                failed[name] = one_line(error)
            keep({"rows": table(times, failed, size)})


def table(
    times: dict[str, list[dict[str, float]]], failed: dict[str, str], size: int
) -> list[dict[str, Any]]:
    """A row for each case; the first of several rounds is left out."""

    def seconds(name: str) -> float | None:
        warm = times[name][1:] or times[name]
        return statistics.median(t["seconds"] for t in warm) if warm else None

    floor = seconds("copying BF16")
    rows = []
    for name, each in times.items():
        row: dict[str, Any] = {"name": name}
        if median := seconds(name):
            row |= {**each[-1], "seconds": median, "rounds": len(each), "GBps": size / 1e9 / median}
            row |= {"speed": floor / median} if floor else {}
            row |= {k: max(t[k] for t in each) for k in ("peak_GiB", "peak_ratio") if k in each[0]}
        else:
            row["missing"] = failed.get(name, "out of time")
        rows.append(row)
    return rows
