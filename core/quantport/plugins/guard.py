"""Calls of a stranger's code: bounded by time, and whatever it raises is an answer."""

from __future__ import annotations

import contextvars
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from quantport.errors import ConfigError

SECONDS = 30.0
VARIABLE = "QUANTPORT_PLUGIN_SECONDS"
T = TypeVar("T")


def time_limit() -> float:
    """Seconds that a plugin may take for one answer: 30, or what the environment says.

    Raises:
        ConfigError: the environment says no number of seconds.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text) if text.strip() else SECONDS
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise ConfigError(f"{VARIABLE}={text[:40]}", "no number of seconds", f"{SECONDS:g}, the default")
    return seconds


def answers(calls: Sequence[Callable[[], T]], seconds: float) -> list[T | Exception]:
    """Calls functions side by side, each in a thread of its own, and waits for all of them together.

    What has not answered in time goes on in the background, where its answer is lost. Code that hangs and
    holds the interpreter meanwhile cannot be bounded so.

    Args:
        calls: The functions.
        seconds: How long to wait.

    Returns:
        For each, what it returned or raised; a ``TimeoutError`` where it did neither in time.
    """
    late = TimeoutError(f"no answer within {seconds:g} s ({VARIABLE} sets the limit)")
    outcomes: list[T | Exception] = [late] * len(calls)

    def run(i: int, call: Callable[[], T]) -> None:
        try:
            outcomes[i] = call()
        except Exception as error:  # a stranger's code
            outcomes[i] = error
        except BaseException as error:  # sys.exit(), or an interrupt of its own making
            outcomes[i] = RuntimeError(f"it wanted to end the process: {type(error).__name__}: {error}")

    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(run, i, call), daemon=True)
        for i, call in enumerate(calls)
    ]
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return list(outcomes)


def answer(call: Callable[[], T], seconds: float) -> T:
    """Calls one function, bounded by time.

    Raises:
        TimeoutError: it has not answered.
        Exception: whatever it raises.
    """
    (outcome,) = answers([call], seconds)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
