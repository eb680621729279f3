"""Streams weights: read, quantize on the device, pack, drop. Several tensors at a time, as many as fit the
budget.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch

from quantport.checkpoint.streaming import drop_idle
from quantport.errors import BudgetError, ConfigError
from quantport.loading.threads import one_native_thread

TOGETHER = 16 << 20  # bytes that small tasks need which run one after the other in one turn
SHARES = 16  # turns for each worker, at least: none waits long for the last of another
LOOK = 0.5  # seconds: an interrupt that comes just before Python waits is seen when it ends to wait
PAUSE = (
    0.005  # seconds between looks at what is finished: a thread that wakes for each takes time from others
)

Progress = Callable[[int, int, str], None]


class Task(NamedTuple):
    """One unit of work: a weight to quantize or a tensor to copy.

    Attributes:
        name: For progress.
        size: Bytes that it reads.
        run: Does it. Runs in a worker thread with one native thread, since parallelism is over tensors.
        need: Bytes that it holds meanwhile: what it reads, scratch, and what it stores before that is packed.
        module: Path of the module that it fills.
        together: Does what the ``run`` of several tasks would that have an equal one; None where each runs by
            itself.
    """

    name: str
    size: int
    run: Callable[[], None]
    need: int = 0
    module: str = ""
    together: Callable[[Sequence[Any]], None] | None = None


class Gate:
    """Counts bytes in flight, and lets a task in only when it fits beside those that run.

    Tasks enter in the order in which they come: a large one is never overtaken for ever. One that needs more
    than the whole budget would wait for ever, so it is refused. What a task has freed still counts until the
    allocator has given it back to the system: small tensors of many experts, freed between others that stay,
    leave holes that nothing else fits.

    It is open while ``opened`` is held. Nothing but leaving a ``with`` releases a lock in one step, so that
    no interrupt can come before the gate is shut, as one can at the beginning of a ``finally``.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.used, self.loose = budget, 0, 0
        self.opened = threading.Lock()
        self._turn = threading.Lock()
        self._freed = threading.Condition()

    @contextmanager
    def admit(self, turn: Sequence[Task]) -> Iterator[None]:
        """Inside, the bytes of a turn count: of all its tasks, since what one has freed is loose.

        Raises:
            BudgetError: they can never fit.
            CancelledError: the gate was shut before they fitted.
        """
        need = sum(task.need for task in turn)
        if need > self.budget:
            found = f"{turn[0].name} alone needs {need / 1e6:.1f} MB"
            raise BudgetError(f"stream within {self.budget / 1e6:.1f} MB", found, f"budget={need} or more")
        with self._turn, self._freed:
            self._freed.wait_for(lambda: not self.opened.locked() or self.used + need <= self.budget)
            if not self.opened.locked():
                raise CancelledError
            if self.used + self.loose + need > self.budget:
                give_back()
                self.loose = 0
            self.used += need
        try:
            yield
        finally:
            with self._freed:
                self.used -= need
                self.loose += need
                self._freed.notify_all()

    def wake(self) -> None:
        """Tells tasks that wait that the gate was shut, which they would see when the next task ends."""
        with self._freed:
            self._freed.notify_all()


@cache
def _trim() -> Callable[[int], int] | None:
    """``malloc_trim`` of glibc; other allocators have none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def give_back() -> None:
    """Gives freed memory back to the system, where the C library can; and what waits for the next read."""
    drop_idle()
    trim = _trim()
    if trim:
        trim(0)


def run_tasks(
    tasks: Sequence[Task],
    progress: Progress | None = None,
    workers: int | None = None,
    budget: int | None = None,
) -> None:
    """Runs every task; the first error, or an interrupt, stops the rest and is raised.

    Tasks that run are waited for; a second interrupt ends that too, and then they are the last to run.

    Args:
        tasks: In the order in which they should read.
        progress: Called with (bytes done, bytes in total, name) after each task, from this thread.
        workers: Threads; the number of usable cores by default.
        budget: The ``need`` of the tasks in flight is never more than this; None for no bound.

    Raises:
        BudgetError: one task alone needs more.
    """
    if workers is not None and not (isinstance(workers, int) and workers > 0):
        raise ConfigError(
            f"workers={workers!r}", "not a number of threads", "1 or more; by default the number of cores"
        )
    count = workers or (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    gate = Gate(sys.maxsize if budget is None else budget)
    started: list[threading.Thread] = []

    def begin() -> None:
        started.append(threading.current_thread())
        one_native_thread()
        torch.set_flush_denormal(False)  # a new thread has what the one that starts it has

    pool = ThreadPoolExecutor(count, "quantport", initializer=begin)
    try:
        with gate.opened:
            turns = _turns(tasks, count, gate.budget)
            _wait({pool.submit(_quiet, turn, gate): turn for turn in turns}, progress)
    finally:
        gate.wake()
        pool.shutdown(wait=True, cancel_futures=True)
        for thread in started:  # the pool does not know one during whose start an interrupt came
            thread.join()
        give_back()


def _turns(tasks: Sequence[Task], workers: int, budget: int) -> Iterator[list[Task]]:
    """What runs one after the other: to take turns for each costs as much as to quantize a small weight."""
    most, room = max(1, len(tasks) // (SHARES * workers)), min(TOGETHER, budget // workers)
    turn, need = list[Task](), 0
    for task in tasks:
        if turn and (len(turn) == most or need + task.need > room):
            yield turn
            turn, need = [], 0
        turn.append(task)
        need += task.need
    if turn:
        yield turn


def _wait(futures: Mapping[Future[None], Sequence[Task]], progress: Progress | None) -> None:
    total, done = sum(task.size for turn in futures.values() for task in turn), 0
    finished: SimpleQueue[Future[None]] = SimpleQueue()
    for future in futures:  # not ``wait``, which looks at all of them each time that one is done
        future.add_done_callback(finished.put)
    left = len(futures)
    while left:
        for future in _next(finished):
            future.result()
            left -= 1
            for task in futures[future]:
                done += task.size
                if progress:
                    progress(done, total, task.name)
        if left:
            time.sleep(PAUSE)


def _next(finished: SimpleQueue[Future[None]]) -> Iterator[Future[None]]:
    """Those that are finished, at least one; interrupts are seen meanwhile."""
    while True:
        with suppress(Empty):
            yield finished.get(timeout=LOOK)
            break
    with suppress(Empty):
        while True:
            yield finished.get_nowait()


def _quiet(turn: Sequence[Task], gate: Gate) -> None:
    with gate.admit(turn), torch.no_grad():
        for run in _runs(turn):
            if not gate.opened.locked():
                raise CancelledError
            run()


def _runs(turn: Sequence[Task]) -> Iterator[Callable[[], None]]:
    """What the tasks of a turn do: each by itself, then what several do together."""
    alike: dict[Callable[[Sequence[Any]], None], list[Callable[[], None]]] = {}
    for task in turn:
        if task.together is None:
            yield task.run
        else:
            alike.setdefault(task.together, []).append(task.run)
    for together, runs in alike.items():
        yield partial(together, runs) if len(runs) > 1 else runs[0]
