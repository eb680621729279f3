"""Runs a compiled kernel over blocks, on torch's own threads.

A kernel is a C function ``void(int64*)``. Its argument is a frame of int64 words: word 0 counts the blocks
that were begun, word 1 is the number of blocks, the rest are addresses and sizes. Every thread begins blocks
until none is left, so a thread that comes late does less. On Linux the threads are those of the OpenMP team
that torch itself uses, so that the two do not contend for cores; elsewhere they are a pool.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from llvmlite import ir
from numba.core import types

from quantport.backend import once
from quantport_cpu.jit import machine, store
from quantport_cpu.jit.memory import Array, has_memory
from quantport_cpu.jit.simd import I64, Simd, Value, inline
from quantport_cpu.jit.target import host_target

FRAME_WORDS = 16  # words of a frame
_PACK = [
    struct.Struct(f"{2 + count}q").pack_into for count in range(FRAME_WORDS - 1)
]  # by number of arguments
ONE_THREAD_ELEMENTS = 1 << 18  # below this many, one thread is enough

Body = Callable[[Any], None]
_C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_COMPILE_LOCK = threading.RLock()


@inline(types.int64)
def next_block(simd: Simd, frame: Value) -> Value:
    """The block of a frame that nobody has begun, counted across threads."""
    pointer = simd.b.inttoptr(frame, ir.PointerType(I64))
    return simd.b.atomic_rmw("add", pointer, ir.Constant(I64, 1), "monotonic")


@inline(types.int64)
def block_count(simd: Simd, frame: Value) -> Value:
    """How many blocks a frame has."""
    return simd.load(I64, 0, simd.at(frame, 8))


class Code(NamedTuple):
    """Machine code that is loaded.

    Attributes:
        owner: What keeps it in memory.
        address: Where the function begins.
        call: Calls it with the address of a frame.
    """

    owner: Any
    address: int
    call: Callable[[int], None]


class Kernel:
    """A kernel that is compiled on its first call, once per machine where the cache can be written."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self._code: Code | None = None
        self._frames: list[tuple[Any, int]] = []  # that no call uses now, and their addresses

    def _load(self) -> Code:
        name = store.key(self.body, host_target())
        code = store.read(name)
        if code is None:
            code = machine.compile_object(machine.assembly(self.body))
            store.write(name, code)
        owner, address = machine.load(code)
        return Code(owner, address, _C_FUNCTION(address))

    @property
    def code(self) -> Code:
        """The machine code, compiled or read from the cache on the first use."""
        if self._code is None:
            with _COMPILE_LOCK:
                if self._code is None:
                    self._code = self._load()
        return self._code

    def __call__(self, blocks: int, *words: int | Array, threads: int = 1) -> None:
        """Runs over all blocks. Over fake tensors, which have no memory, it does nothing.

        Args:
            blocks: How many there are.
            words: The frame from word 2 on: sizes, and memory that was checked.
            threads: Native threads that share the blocks.
        """
        if not has_memory(words):
            return
        code, arguments = self._code or self.code, [w.address if type(w) is Array else w for w in words]
        try:
            frame, address = self._frames.pop()
        except IndexError:
            frame = (ctypes.c_int64 * FRAME_WORDS)()
            address = ctypes.addressof(frame)
        _PACK[len(arguments)](frame, 0, 0, blocks, *arguments)
        if threads == 1 or blocks == 1:
            code.call(address)
        elif (openmp_parallel := _openmp_parallel()) is not None:
            openmp_parallel(code.address, address, threads, 0)
        else:
            _run_on_pool(code, address, threads, frame, words)
        self._frames.append((frame, address))  # not one that an interrupt left to others


def _run_on_pool(code: Code, address: int, threads: int, *held: object) -> None:
    # An interrupt may end this call before theirs: each holds what it works on.
    pool = _thread_pool(threads - 1)
    others = [pool.submit(_call, code.call, address, *held) for _ in range(threads - 1)]
    code.call(address)
    for other in others:
        other.result()


def _call(call: Callable[[int], None], address: int, *_held: object) -> None:
    call(address)


def threads_for(elements: int) -> int:
    """Threads for a kernel that reads this many weight elements."""
    return 1 if elements < ONE_THREAD_ELEMENTS else torch.get_num_threads()


@once
def _thread_pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "quantport-jit")


@once
def _openmp_parallel() -> Any:
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
