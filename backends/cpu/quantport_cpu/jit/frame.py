"""Compiles kernels and runs them on torch's own threads.

A kernel is a C function ``void(int64*)``. Its argument is a frame: word 0 counts the blocks that were taken,
word 1 is the number of blocks, the rest are addresses and sizes. Every thread takes blocks until none is
left, so a thread that comes late does less. On Linux the threads are those of the OpenMP team that torch
itself uses, so that the two do not contend for cores; elsewhere they are a pool.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from numba.core import types

from quantport.backend import once
from quantport_cpu.jit import machine, store
from quantport_cpu.jit.emit import I64, Simd, Value, inline
from quantport_cpu.jit.memory import Array, has_memory
from quantport_cpu.jit.target import host_target

SIZE = 16  # words of a frame
SMALL = 1 << 18  # elements under which one thread is enough

Body = Callable[[Any], None]
_C = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_COMPILING = threading.RLock()


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
    """A kernel that is compiled on its first call, once per machine where the cache can be written."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self._code: tuple[Any, int, Callable[[int], None]] | None = (
            None  # what owns the machine code, its address, and the call
        )

    def _load(self) -> tuple[Any, int, Callable[[int], None]]:
        name = store.key(self.body, host_target())
        code = store.read(name)
        if code is None:
            code = machine.compiled(machine.assembly(self.body))
            store.write(name, code)
        owner, address = machine.load(code)
        return owner, address, _C(address)

    @property
    def code(self) -> tuple[Any, int, Callable[[int], None]]:
        """The machine code, which is compiled or read on the first use: what owns it, its address, and the
        call.
        """
        if self._code is None:
            with _COMPILING:
                if self._code is None:
                    self._code = self._load()
        return self._code

    def __call__(self, blocks: int, *words: int | Array, threads: int = 1) -> None:
        """Runs over ``blocks`` blocks. Over fake tensors, which have no memory, it does nothing.

        Args:
            blocks: How many.
            words: Words 2 and up of the frame: sizes, and memory that was checked.
            threads: Native threads that share them.
        """
        if not has_memory(words):
            return
        frame = (ctypes.c_int64 * SIZE)(0, blocks, *(w.address if isinstance(w, Array) else w for w in words))
        address, (_, start, call) = ctypes.addressof(frame), self.code
        if threads == 1 or blocks == 1:
            call(address)
            return
        team = _team()
        if team is not None:
            team(start, address, threads, 0)
            return
        # An interrupt may end this call before theirs: each holds what it works on.
        others = [_pool(threads - 1).submit(_call, call, address, frame, words) for _ in range(threads - 1)]
        call(address)
        for other in others:
            other.result()


def _call(call: Callable[[int], None], address: int, *_held: object) -> None:
    call(address)


def threads_for(elements: int) -> int:
    """Threads for a kernel that reads this many weight elements."""
    return 1 if elements < SMALL else torch.get_num_threads()


@once
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "quantport-jit")


@once
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
