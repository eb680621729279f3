"""Runs a compiled kernel over blocks, on torch's own threads.

A kernel is a C function ``void(int64*)``. Its argument is a frame of int64 words: word 0 counts the blocks
that were begun, word 1 is the number of blocks, the rest are addresses and sizes. Before them lie four words:
how many blocks are finished, where others wait for them; and of the scratch of threads, how many have taken
their slot of it, where it begins, and bytes of a slot. Every thread begins blocks
until none is left, so a thread that comes late does less. On Linux the threads are those of the OpenMP team
that torch itself uses, so that the two do not contend for cores; elsewhere they are a pool.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from llvmlite import ir
from numba import njit
from numba.core import types

from quantport.backend import once
from quantport_cpu.jit import machine, store
from quantport_cpu.jit.memory import Array, has_memory
from quantport_cpu.jit.simd import I32, I64, Simd, Value, inline
from quantport_cpu.jit.target import host_target

FRAME_WORDS = 28  # words of a frame
OWN_WORDS = 4  # words before it
_PACK = [
    struct.Struct(f"{OWN_WORDS + 2 + count}q").pack_into for count in range(FRAME_WORDS - 1)
]  # by number of arguments
_TURNS = 1 << 12  # that a thread waits for others before it lets the system run them
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
def take_slot(simd: Simd, frame: Value) -> Value:
    """The scratch of the calling thread, aligned to nothing; once in a call."""
    pointer = simd.b.inttoptr(simd.at(frame, -24), ir.PointerType(I64))
    number = simd.b.atomic_rmw("add", pointer, ir.Constant(I64, 1), "monotonic")
    first, size = (simd.load(I64, 0, simd.at(frame, place)) for place in (-16, -8))
    return simd.b.add(first, simd.b.mul(number, size))


@inline(types.void)
def finish_block(simd: Simd, frame: Value) -> None:
    """Counts a block as finished: what it wrote is seen by those that waited for it."""
    pointer = simd.b.inttoptr(simd.at(frame, -32), ir.PointerType(I64))
    simd.b.atomic_rmw("add", pointer, ir.Constant(I64, 1), "release")


@inline(types.int64)
def finished_blocks(simd: Simd, frame: Value) -> Value:
    """How many blocks are finished."""
    pointer = simd.b.inttoptr(simd.at(frame, -32), ir.PointerType(I64))
    return simd.b.load_atomic(pointer, "acquire", 8)


@inline(types.void)
def let_others_run(simd: Simd, turn: Value) -> None:
    """A turn of a loop that waits for other threads."""
    simd.pause()
    with simd.b.if_then(simd.b.icmp_signed(">=", turn, I64(_TURNS)), likely=False):
        simd.call("sched_yield", I32)


@njit(error_model="numpy")
def wait_for_blocks(frame, count):
    """Waits until ``count`` blocks are finished: each was begun by a thread that does not wait."""
    turn = 0
    while finished_blocks(frame) < count:
        let_others_run(turn)
        turn += 1


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


class Frame:
    """The memory of one call at a time: its words, and the scratch of its threads."""

    def __init__(self) -> None:
        self.words = (ctypes.c_int64 * (OWN_WORDS + FRAME_WORDS))()
        self.address = ctypes.addressof(self.words) + 8 * OWN_WORDS
        self._scratch: Any = None
        self._size = self._place = 0

    def scratch(self, size: int) -> int:
        """The address of ``size`` bytes, which may hold anything."""
        if size > self._size:
            self._scratch = (ctypes.c_char * size)()
            self._size, self._place = size, ctypes.addressof(self._scratch)
        return self._place


class Kernel:
    """A kernel that is compiled on its first call, once per machine where the cache can be written."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self._code: Code | None = None
        self._frames: list[Frame] = []  # that no call uses now

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

    def __call__(self, blocks: int, *words: int | Array, threads: int = 1, slot: int = 0) -> None:
        """Runs over all blocks. Over fake tensors, which have no memory, it does nothing.

        Args:
            blocks: How many there are.
            words: The frame from word 2 on: sizes, and memory that was checked.
            threads: Native threads that share the blocks.
            slot: Bytes of scratch for each of them.
        """
        if has_memory(words):
            arguments: Any = [w.address if type(w) is Array else w for w in words]
            self.launch(blocks, arguments, threads, slot, words)

    def launch(self, blocks: int, arguments: Sequence[int], threads: int, slot: int, held: object) -> None:
        """As a call, over words with addresses: of memory that was checked, and that ``held`` keeps."""
        code = self._code or self.code
        try:
            frame = self._frames.pop()
        except IndexError:
            frame = Frame()
        address, scratch = frame.address, frame.scratch(threads * slot)
        _PACK[len(arguments)](frame.words, 0, 0, 0, scratch, slot, 0, blocks, *arguments)
        if threads == 1 or blocks == 1:
            code.call(address)
        elif (openmp_parallel := _openmp_parallel()) is not None:
            openmp_parallel(code.address, address, threads, 0)
        else:
            _run_on_pool(code, address, threads, frame, held)
        self._frames.append(frame)  # not one that an interrupt left to others


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
