"""Streams weights: read, quantize on the device, pack, drop. Bounded memory, several tensors at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import NamedTuple

import torch

from quantport.errors import ConfigError

Progress = Callable[[int, int, str], None]


class Task(NamedTuple):
    """One unit of work: a weight to quantize or a tensor to copy.

    Attributes:
        name: For progress.
        size: Bytes that it reads.
        run: Does it. Runs in a worker thread with one native thread, since parallelism is over tensors.
    """

    name: str
    size: int
    run: Callable[[], None]


def run_tasks(tasks: Sequence[Task], progress: Progress | None = None, workers: int | None = None) -> None:
    """Runs every task; the first error stops the rest and is raised.

    Args:
        tasks: In the order in which they should read.
        progress: Called with (bytes done, bytes in total, name) after each task, from this thread.
        workers: Threads; the number of usable cores by default.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers={workers}", "not a number of threads", "1 or more; by default the number of cores")
    total, done = sum(t.size for t in tasks), 0
    count = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "quantport", initializer=torch.set_num_threads, initargs=(1,))
    try:
        futures = {pool.submit(_quiet, task.run): task for task in tasks}
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, return_when=FIRST_EXCEPTION if progress is None else "FIRST_COMPLETED")
            for future in finished:
                future.result()
                done += futures[future].size
                if progress:
                    progress(done, total, futures[future].name)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def _quiet(run: Callable[[], None]) -> None:
    with torch.no_grad():
        run()
