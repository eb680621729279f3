"""Handles: the text by which an operator finds the kernel and the scheme that it runs.

A handle says what it stands for (``cpu.int8|int8|4096x4096``), so that a traced graph is plain data: where a
compile cache or an exported program carries it into another process, it is parsed and bound through the
registry of that process. What names alone do not find in the process's own registry carries the token of its
registry besides (``toy.int8|int8|64x64|5f3a9c01``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote, unquote
from weakref import WeakValueDictionary

from quantport.errors import BackendError
from quantport.kernels.base import Kernel, WeightSpec
from quantport.kernels.wrapped import kernel_for
from quantport.plugins.registry import Registry, default_registry


@dataclass(frozen=True, eq=False)
class BoundWeight:
    """A kernel, the weight that it is bound to, and the handle by which operators find both."""

    kernel: Kernel
    spec: WeightSpec
    handle: str

    @property
    def portable(self) -> bool:
        """Whether the names in the handle are enough to find the same in the process's own registry."""
        return self.handle.count("|") == 2


# Operators are functions of the process, and so is the table of what their handles mean. What names find
# again stays; what belongs to another registry lives as long as the modules that hold it.
_PORTABLE: dict[str, BoundWeight] = {}
_BY_TOKEN: WeakValueDictionary[str, BoundWeight] = WeakValueDictionary()


def bind(kernel: Kernel, spec: WeightSpec, registry: Registry) -> BoundWeight:
    """Binds a kernel to a weight, under a handle that operators resolve.

    Args:
        kernel: The kernel.
        spec: Scheme and shape.
        registry: Where the kernel comes from.
    """
    runs = kernel_for(kernel, spec.scheme)
    content = f"{_quoted(kernel.name)}|{_quoted(spec.scheme.name)}|{spec.n}x{spec.k}"
    known = _PORTABLE.get(content)
    if known is not None and known.kernel is runs and known.spec == spec:
        return known
    if registry.is_default and registry.identifies(kernel, spec.scheme):
        made = _PORTABLE[content] = BoundWeight(runs, spec, content)
        return made
    # The second is for a kernel that its registry does not hold, or holds no longer.
    for token in (registry.token, f"{registry.token}-{id(kernel):x}-{hash(spec):x}"):
        held = _BY_TOKEN.setdefault(f"{content}|{token}", BoundWeight(runs, spec, f"{content}|{token}"))
        if held.kernel is runs and held.spec == spec:
            return held
    raise BackendError(f"bind {content}", "two schemes of this name", "a name of its own for each scheme")


def resolve(handle: str) -> BoundWeight:
    """What a handle stands for.

    Raises:
        BackendError: this process has no such kernel, or the text is no handle.
        ConfigError: this process has no such scheme.
    """
    return _PORTABLE.get(handle) or _BY_TOKEN.get(handle) or _parsed(handle)


def _parsed(handle: str) -> BoundWeight:
    """Binds the names of a handle that another process made."""
    names = handle.split("|")
    n, _, k = names[2].partition("x") if len(names) > 2 else ("", "", "")
    if len(names) > 3:
        found = "it belongs to another registry than that of the process, and that is gone"
        raise BackendError(f"run {handle!r}", found, "keep the modules that it was made with")
    if not (n.isdecimal() and k.isdecimal()):
        raise BackendError(f"run {handle!r}", "it is no handle", "'kernel|scheme|out_featuresxin_features'")
    registry = default_registry()
    kernel, scheme = map(unquote, names[:2])
    return bind(registry.kernel(kernel), WeightSpec(registry.schemes[scheme], int(n), int(k)), registry)


@lru_cache(maxsize=256)
def _quoted(name: str) -> str:
    """A name without the characters that separate the parts of a handle."""
    return quote(name, safe=" /:+.-_")
