"""A process of its own, for what may crash or hang: it is started once, and again when it ended."""

from __future__ import annotations

import importlib
import multiprocessing
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

START = 180.0  # seconds for the process to import torch, on a busy machine


class Ended(Exception):  # noqa: N818  # not an error: what was called was not to return
    """The process ended before it answered, or was ended after the limit; the text says how."""


def setting_of(name: str) -> AbstractContextManager[Any]:
    """The context manager that ``module:function`` makes; of nothing, one that does nothing."""
    if not name:
        return nullcontext()
    module, _, function = name.partition(":")
    made: AbstractContextManager[Any] = getattr(importlib.import_module(module), function)()
    return made


class Apart:
    """Calls functions in another process, one after the other.

    Args:
        limit: Seconds that a call may take.
        setting: ``module:function`` of a context manager in which the process lives: a simulator, for
            instance.
    """

    def __init__(self, limit: float, setting: str = "") -> None:
        self.limit, self.setting = limit, setting
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Apart:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns; it and its arguments are pickled.

        Raises:
            Ended: the process ended, or the call took longer than the limit.
            RuntimeError: the call itself could not be made, or the function raised: a fault of whoever calls.
        """
        pipe = self._started()
        pipe.send((function, arguments))
        return self._answer(pipe, self.limit)

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def _started(self) -> Connection:
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")  # a fork would copy the threads of torch half
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self.setting), daemon=True)
            self._process.start()
            theirs.close()
            try:
                self._answer(self._pipe, START)
            except Ended as end:
                raise RuntimeError(f"the process for refused calls does not start: {end}") from None
        return self._pipe

    def _answer(self, pipe: Connection, limit: float) -> Any:
        if not pipe.poll(limit):
            self.close()
            raise Ended(f"took longer than {limit:g} s")
        try:
            good, value = pipe.recv()
        except EOFError:
            raise Ended(self._end()) from None
        if not good:
            raise RuntimeError(value)
        return value

    def _end(self) -> str:
        """How the process ended."""
        assert self._process is not None  # it has just ended
        self._process.join()
        code = self._process.exitcode or 0
        self.close()
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _serve(pipe: Connection, setting: str) -> None:
    """Answers calls until the other end closes."""
    try:
        with setting_of(setting):
            pipe.send((True, None))
            while True:
                try:
                    function, arguments = pipe.recv()
                    answer = (True, function(*arguments))
                except EOFError:
                    return
                except Exception as error:
                    answer = (False, f"{type(error).__name__}: {error}")
                pipe.send(answer)
    except Exception as error:
        pipe.send((False, f"{setting}: {type(error).__name__}: {error}"))
