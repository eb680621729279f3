"""Values that are made once in a process, whichever threads ask first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, cached_property, wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def once(function: Callable[P, T]) -> Callable[P, T]:
    """``functools.cache`` that never computes anything twice: a second thread waits for the first.

    For tables, kernels and whatever else must not be there twice. What a tensor is made from belongs among
    the arguments or is plain numbers, with dtype and device stated: the first call must not decide for the
    others. An exception is not kept.

    Example:
        >>> @once
        ... def powers(device: torch.device) -> Tensor:
        ...     return torch.tensor([1, 2, 4], dtype=torch.float32, device=device)
    """
    kept, lock = cache(function), threading.RLock()

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with lock:
            return kept(*args, **kwargs)  # type: ignore[arg-type]  # ``cache`` refuses what cannot be hashed

    return call


class once_property(cached_property[T]):  # noqa: N801  # as cached_property, which since Python 3.12 may compute twice
    """``functools.cached_property`` that never computes twice."""

    def __init__(self, function: Callable[[Any], T]) -> None:
        super().__init__(function)
        self._making = threading.RLock()

    def __get__(self, instance: Any, owner: type | None = None) -> T:  # type: ignore[override]  # nobody asks the class for it
        with self._making:
            value: T = super().__get__(instance, owner)
            return value
