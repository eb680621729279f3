"""Interrupts while weights are streamed, once and twice: what runs is the last to run. Threads keep their
numbers.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from core_models import MOE

import quantport
from quantport.loading import threads
from quantport.loading.executor import Task, run_tasks

# The second interrupt strikes where it did most harm: before anything was cancelled.
TWICE = """
import json, signal, threading
import torch
from quantport.loading import executor

torch.set_num_threads(3)
ran, pools, go, submitted, running = [], [], threading.Event(), threading.Event(), threading.Semaphore(0)
PLAIN, NEXT = executor.ThreadPoolExecutor, executor._next


class Pool(PLAIN):
    def shutdown(self, *args, **options):
        pools.append(self)
        signal.raise_signal(signal.SIGINT)
        super().shutdown(*args, **options)


def held():
    ran.append("held")
    running.release()
    go.wait()


def next_one(finished):
    submitted.set()
    return NEXT(finished)


def first():
    submitted.wait()
    running.acquire(), running.acquire()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


executor.ThreadPoolExecutor, executor._next = Pool, next_one
late = executor.Task("late", 1, lambda: ran.append("late"), 40)
threading.Thread(target=first).start()
try:
    executor.run_tasks([executor.Task("held", 1, held, 40)] * 2 + [late] * 50, workers=4, budget=90)
except KeyboardInterrupt:
    told = ["interrupted", torch.get_num_threads()]
    new = threading.Thread(target=lambda: told.append(torch.get_num_threads()))
    new.start(), new.join(), go.set()
PLAIN.shutdown(pools[0])  # waits until everything that is still queued has run or was refused
print(json.dumps([told, ran]))
"""
LOAD = """
import sys, threading
import quantport
from quantport.loading import executor, fill_model

pause = threading.Event()


def tasks(self):
    def slow(task):
        return task._replace(run=lambda: (task.run(), pause.wait(0.05)))
    return [*map(slow, plain(self)), *[slow(executor.Task("more", 1, lambda: None))] * 4000]


plain, fill_model.ModelFiller.tasks = fill_model.ModelFiller.tasks, tasks
try:
    said = lambda done, *_: done and print("loading", flush=True)
    quantport.load(sys.argv[1], "int8", workers=2, progress=said)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


HEAR = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # under nohup it is ignored


@contextmanager
def python(code, *arguments):
    """A process that runs code, and ends with the test."""
    command = [sys.executable, "-c", f"{HEAR}\n{code}", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def here_and_new():
    """Native threads of this thread, and of one that is new."""
    told = [torch.get_num_threads()]
    new = threading.Thread(target=lambda: told.append(torch.get_num_threads()))
    new.start()
    new.join()
    return told


@pytest.fixture
def three():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_second_interrupt_leaves_no_task_that_starts_and_no_number_of_threads():
    with python(TWICE) as child:
        out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    told, ran = json.loads(out)
    assert told == ["interrupted", 3, 3]
    assert ran == ["held", "held"], "those at the gate and in the queue never run"


@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_interrupted_load_ends(times):
    with python(LOAD, MOE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "loading\n"
        for _ in range(times):
            child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=120)
    assert "interrupted" in out or child.returncode in (-signal.SIGINT, 130), err
    assert out.count("loading") < 1000, "of thousands"


def test_workers_have_one_native_thread_and_threads_that_start_meanwhile_have_theirs(three):
    seen, meanwhile = [], []

    def work():
        seen.append(torch.get_num_threads())
        meanwhile.extend(here_and_new()[1:])

    run_tasks([Task(str(i), 1, work) for i in range(4)], workers=2)
    assert seen == [1] * 4
    assert meanwhile == [3] * 4
    assert here_and_new() == [3, 3]


def test_without_the_function_of_openmp_the_number_of_the_process_is_put_back(monkeypatch, three):
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    told = []

    def work():
        threads.one_native_thread()
        told.append(torch.get_num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert told == [1]
    assert here_and_new() == [3, 3]


def test_on_linux_nothing_of_the_process_is_set(monkeypatch):
    if not (sys.platform == "linux" and torch.backends.openmp.is_available()):
        pytest.skip("OpenMP of torch is looked up by name in Linux's loader")
    monkeypatch.setattr(torch, "set_num_threads", lambda n: pytest.fail(f"set to {n}"))
    quantport.load(MOE, "int8", workers=2)


@pytest.mark.parametrize("nth", [1, 2])
def test_an_interrupt_while_a_thread_starts_waits_for_what_it_runs(monkeypatch, nth):
    """The pool does not know that thread: what it writes to would be taken away under it."""
    start, left, ran = threading.Thread.start, [nth], []

    def interrupted(thread):
        start(thread)
        left[0] -= 1
        if not left[0]:
            begun.wait(5)
            raise KeyboardInterrupt

    def run(task):
        begun.set()
        time.sleep(0.1 * (1 + 3 * task))  # the second thread is the last to end
        ran.append(threading.current_thread().name)

    begun = threading.Event()
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_tasks([Task(str(i), 1, partial(run, i)) for i in range(2)], workers=2)
    assert ran, "what was running has ended"
    assert not [thread for thread in threading.enumerate() if thread.name in ran]
