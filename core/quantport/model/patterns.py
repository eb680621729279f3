"""Patterns of module names: exact, glob, or regular expression."""

from __future__ import annotations

import fnmatch
import re
from functools import cache

from quantport.errors import ConfigError


@cache
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compiles an exact name, a glob, or ``re:`` and a regular expression.

    Raises:
        ConfigError: the regular expression is wrong.
    """
    if not pattern.startswith("re:"):
        return re.compile(fnmatch.translate(pattern))
    try:
        return re.compile(pattern[3:])
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"pattern {pattern!r}", f"not a regular expression: {error}", "see Python's re, or use a glob"
        ) from None
