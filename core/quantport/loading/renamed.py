"""Arguments that had other names: the old ones still work, and say what they are called now."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def renamed(old: str, new: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Lets a function be called with a keyword argument under the name that it had, with a warning."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        position = list(signature(function).parameters).index(new)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if old in kwargs and new not in kwargs and len(args) <= position:
                warnings.warn(f"{old}= is called {new}= now", DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate
