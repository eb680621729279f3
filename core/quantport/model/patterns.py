"""Patterns of module names: exact, glob, regular expression, or a module as Transformers leaves it out."""

from __future__ import annotations

import fnmatch
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

from quantport.errors import ConfigError

MODULE = "module:"
_MAX_LENGTH = 1000
_MAX_SIZE = 250_000  # characters times counted repeats, which the engine writes out: 0.1 s to compile
_SECONDS = 0.25  # of CPU, for one name
_IN_ALL = 0.5  # of CPU, for the names of a model
_QUICK = 0.001  # s: what any sound pattern takes, hundreds of times over
_BRACE = re.compile(
    r"(?<!\\)(?<!\\N)\{(?![\d,])"
)  # a character to Python, an inexact match to the other engine
_REPEAT = re.compile(r"\{(\d*),?(\d*)\}")
_LEFT: ContextVar[list[float] | None] = ContextVar("seconds that are left", default=None)


@contextmanager
def bounded() -> Iterator[None]:
    """Bounds the time that all patterns together take, for all names that are matched in the block."""
    token = _LEFT.set([_IN_ALL])
    try:
        yield
    finally:
        _LEFT.reset(token)


@dataclass(frozen=True)
class Pattern:
    """A compiled pattern.

    Attributes:
        text: As the user wrote it.
        matches: Whether it matches a name.
    """

    text: str
    matches: Callable[[str], bool]

    def match(self, name: str) -> bool:
        """Whether it matches a name.

        Raises:
            ConfigError: a regular expression that takes too long, such as ``(a|a)*b``.
        """
        start = time.perf_counter()
        try:
            matched = self.matches(name)
            if time.perf_counter() - start > _QUICK:
                self._charge(name)
        except TimeoutError:
            raise ConfigError(
                f"pattern {self.text[:80]!r}",
                f"a regular expression that takes too long, for {name[:80]!r} more than it may",
                "one without repeats inside of repeats, or a glob",
            ) from None
        return matched

    def _charge(self, name: str) -> None:
        """Measures a long match once more, by CPU time: that a machine is busy is no fault of a pattern."""
        left = _LEFT.get()
        if left is not None:
            start = time.thread_time()
            self.matches(name)
            left[0] -= time.thread_time() - start
            if left[0] < 0:
                raise TimeoutError


@cache
def compile_pattern(pattern: str) -> Pattern:
    """Compiles an exact name, a glob, ``re:`` and a regular expression, or ``module:`` and what Transformers
    takes as a member of ``modules_to_not_convert``.

    Raises:
        ConfigError: the regular expression is wrong, or would take much memory to compile.
    """
    if pattern.startswith("re:"):
        return Pattern(pattern, _expression(pattern, pattern[3:]))
    if pattern.startswith(MODULE):
        # transformers/quantizers/quantizers_utils.py, should_convert_module
        key = pattern.removeprefix(MODULE)
        starts = _expression(pattern, rf"(?:{key})(?:(?<=\.)|(?=\.|$))")
        return Pattern(pattern, lambda name: name.endswith(key) or starts(name))
    glob = re.compile(fnmatch.translate(pattern))  # which does not backtrack over its stars
    return Pattern(pattern, lambda name: glob.match(name) is not None)


def _expression(pattern: str, expression: str) -> Callable[[str], bool]:
    """Matches from the start of a name, in bounded time: Python's own engine cannot be interrupted."""
    if len(expression) > _MAX_LENGTH:
        found = f"a regular expression of {len(expression):,} characters"
        raise ConfigError(f"pattern {pattern[:80]!r}...", found, f"at most {_MAX_LENGTH:,}: several patterns")
    repeats = math.prod(max(1, *(int(n or 0) for n in counts)) for counts in _REPEAT.findall(expression))
    if len(expression) * repeats > _MAX_SIZE:
        found = f"counted repeats that make it longer than {_MAX_SIZE:,} characters"
        raise ConfigError(f"pattern {pattern!r}", found, "* or + instead of {n}, or a glob")
    import regex  # on use: most configurations have no regular expression

    try:
        re.compile(expression)  # the grammar is Python's
        compiled: Any = regex.compile(_BRACE.sub(r"\{", expression))
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"pattern {pattern!r}", f"not a regular expression: {error}", "see Python's re, or use a glob"
        ) from None
    return lambda name: compiled.match(name, timeout=_SECONDS) is not None
