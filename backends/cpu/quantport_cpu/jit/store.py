"""Stores the machine code of kernels on disk, so that each is compiled once per machine, not per process.

The key of an entry covers all that its code was made from: every source file of this package, the constants
that come from elsewhere (``ELEMENTS``), the numbers that the kernel captures, the versions of the compilers,
and the processor. An entry that is damaged is compiled again. Where no folder can be written, kernels are
compiled in each process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba

from quantport.backend import cache_folder
from quantport_cpu.jit.elements import ELEMENTS
from quantport_cpu.jit.target import Target

_MAGIC = b"quantport machine code 1\n"
_MAX_ENTRIES = 8  # entries of one kernel, for other processors or older sources; the oldest goes first


def captured(body: Callable[..., Any]) -> tuple[Any, ...]:
    """The numbers that a kernel captures, which are part of its key.

    Raises:
        TypeError: it captures something else, which the key could not tell apart.
    """
    values = tuple(cell.cell_contents for cell in body.__closure__ or ())
    if not all(type(v) in (int, float, str) for v in values):
        raise TypeError(f"{body.__qualname__} captures {values!r}: kernels are made from plain numbers")
    return values


def sources(package: Path) -> str:
    """A digest of every source file of a package and of ``ELEMENTS``; '' for a package without sources."""
    files = sorted(package.glob("*.py"))
    digest = hashlib.sha256(repr(sorted(ELEMENTS.items())).encode())
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest() if files else ""


_PACKAGE = Path(__file__).parent
_IMPORTED = sources(_PACKAGE)  # as they were when this process imported them


def key(body: Callable[..., Any], target: Target) -> str:
    """The name of the entry of a kernel."""
    numbers = "_".join(map(str, captured(body)))
    module, name = body.__module__.rpartition(".")[2], body.__qualname__.partition(".")[0].strip("_")
    kernel = f"{module}.{name}.{numbers}".rstrip(".")
    made_of = (
        _IMPORTED,
        body.__module__,
        body.__qualname__,
        captured(body),
        target,
        platform.machine(),
        platform.python_version(),
        numba.__version__,
        llvmlite.__version__,
    )
    return f"{kernel}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:40]}"


def are_sources_unchanged() -> bool:
    """Whether there are sources, and they are those that this process imported."""
    return bool(_IMPORTED) and sources(_PACKAGE) == _IMPORTED


def read(name: str) -> bytes | None:
    """The object file of an entry; None where it is absent or damaged."""
    if not are_sources_unchanged():
        return None
    try:
        content = (cache_folder() / name).read_bytes()
    except OSError:
        return None
    start = len(_MAGIC) + 32
    is_whole = content[:start] == _MAGIC + hashlib.sha256(content[start:]).digest()
    return content[start:] if is_whole else None


def write(name: str, code: bytes) -> None:
    """Adds an entry, whole or not at all.

    It does nothing where the folder cannot be written, or sources were edited since their import.
    """
    if not are_sources_unchanged():
        return
    with contextlib.suppress(OSError):
        entries = cache_folder()
        entries.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=entries, prefix=".")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(code).digest() + code)
            os.replace(temporary, entries / name)
        except BaseException:
            os.unlink(temporary)
            raise
        same_kernel = entries.glob(f"{name.rpartition('-')[0]}-*")
        for path in sorted(same_kernel, key=lambda path: path.stat().st_mtime)[:-_MAX_ENTRIES]:
            path.unlink(missing_ok=True)
