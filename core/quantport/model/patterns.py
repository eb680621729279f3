"""Patterns of module names: exact, glob, regular expression, or a module as Transformers leaves it out."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from quantport.errors import ConfigError

MODULE = "module:"
_MAX_LENGTH = 1000
_MAX_SIZE = 250_000  # characters times counted repeats, which the engine writes out: 0.1 s to compile
_SECONDS = 0.5  # of CPU, for one name
_BRACE = re.compile(
    r"(?<!\\)(?<!\\N)\{(?![\d,])"
)  # a character to Python, an inexact match to the other engine
_REPEAT = re.compile(r"\{(\d*),?(\d*)\}")


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
        try:
            return self.matches(name)
        except TimeoutError:
            raise ConfigError(
                f"pattern {self.text[:80]!r}",
                f"a regular expression that takes more than {_SECONDS:g} s for {name[:80]!r}",
                "one without repeats inside of repeats, or a glob",
            ) from None


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
