"""Compiles kernels and runs them on torch's own threads.

A kernel is a C function ``void(int64*)``. Its argument is a frame: word 0 counts the blocks that were taken, word 1 is
the number of blocks, the rest are addresses and sizes. Every thread takes blocks until none is left, so a thread that
comes late does less. On Linux the threads are those of the OpenMP team that torch itself uses, so that the two do not
contend for cores; elsewhere they are a pool.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numba
import torch
from llvmlite import ir
from numba.core import types

from quantport_cpu.jit.emit import I64, Simd, Value, inline

SIZE = 16  # words of a frame
SMALL = 1 << 18  # elements under which one thread is enough

Body = Callable[[Any], None]
_C = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@inline(types.int64)
def take(simd: Simd, frame: Value) -> Value:
    """The next block of a frame, counted across threads."""
    pointer = simd.b.inttoptr(frame, ir.PointerType(I64))
    return simd.b.atomic_rmw("add", pointer, ir.Constant(I64, 1), "monotonic")


@inline(types.int64)
def word(simd: Simd, frame: Value, index: Value) -> Value:
    """Word ``index`` of a frame."""
    return simd.load(I64, 0, simd.at(frame, simd.b.mul(index, ir.Constant(I64, 8))))


class Kernel:
    """A kernel that is compiled on its first call, once per machine where numba's cache can be written."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self._address = 0
        self._call: Callable[[int], None] = self._first

    def compile(self) -> Any:
        """Compiles, or loads from numba's cache, and returns numba's function."""
        options: dict[str, Any] = {"error_model": "numpy", "boundscheck": False}
        try:
            return numba.cfunc("void(int64)", cache=True, **options)(self._body)
        except (RuntimeError, OSError):  # no directory for the cache can be written
            return numba.cfunc("void(int64)", **options)(self._body)

    def _first(self, frame: int) -> None:
        self._address = self.compile().address
        self._call = _C(self._address)
        self._call(frame)

    def __call__(self, blocks: int, *words: int, threads: int = 1) -> None:
        """Runs over ``blocks`` blocks; ``words`` are words 2 and up of the frame."""
        frame = (ctypes.c_int64 * SIZE)(0, blocks, *words)
        address = ctypes.addressof(frame)
        if threads == 1 or blocks == 1:
            self._call(address)
            return
        if not self._address:
            self._address = self.compile().address
            self._call = _C(self._address)
        team = _team()
        if team is not None:
            team(self._address, address, threads, 0)
            return
        others = [_pool(threads - 1).submit(self._call, address) for _ in range(threads - 1)]
        self._call(address)
        for other in others:
            other.result()


def threads_for(elements: int) -> int:
    """Threads for a kernel that reads this many weight elements."""
    return 1 if elements < SMALL else torch.get_num_threads()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "quantport-jit")


@cache
def _team() -> Any:
    """``GOMP_parallel`` of the one OpenMP library that torch has loaded, or None."""
    maps = Path("/proc/self/maps")
    if not torch.backends.openmp.is_available() or not maps.is_file():
        return None
    lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
    loaded = sorted(p for p in paths if Path(p).name.startswith(("libgomp", "libiomp", "libomp")))
    if len(loaded) != 1:
        return None
    try:
        fork = ctypes.CDLL(loaded[0]).GOMP_parallel
    except (OSError, AttributeError):
        return None
    fork.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    fork.restype = None
    return fork
