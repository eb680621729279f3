"""One file, read into memory of this process. Where it shrinks meanwhile there is an error, where a mapping
of it would end the process with SIGBUS.

Measured (256 MiB, warm page cache, Linux 6, one thread of an EPYC; CPU seconds to read and to look at every
byte): mapped 0.010; streamed 0.019 in reads of 8 MiB, and 0.036 in reads of 32 MiB, which no cache holds. To
load it as int8 takes 0.12 mapped and 0.14 streamed; the peak of memory is the same.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import threading
import weakref

import torch

from quantport.checkpoint.header import TensorInfo
from quantport.checkpoint.stamp import FileStamp, check_stamp, open_unchanged
from quantport.errors import CheckpointError

SMALL = 1 << 20  # bytes: reads below come from the allocator
IDLE = 32 << 20  # bytes of buffers that wait for the next read
_HUGE_PAGE = 2 << 20


class Buffers:
    """Memory that tensors are read into, lent again once no tensor is left in it: to touch fresh pages costs
    as much as to read into them.

    Idle buffers are what tasks of a load have freed. A read that none of them fits drops them all; so does
    `drop_idle` where the load gives back what it has freed. So they add nothing to its budget.
    """

    def __init__(self) -> None:
        self._idle: list[mmap.mmap] = []  # appended to by whichever thread drops a tensor, so without a lock
        _ALL.append(weakref.ref(self, _ALL.remove))

    def lend(self, size: int) -> memoryview:
        """Returns writable memory of at least ``size`` bytes, taken back when nothing refers to the view."""
        if size < SMALL:
            return memoryview(bytearray(size))
        memory = self._fitting(size) or _pages(size)
        lent = memoryview(memory)
        weakref.finalize(lent, self._take_back, memory).atexit = False
        return lent

    def drop(self) -> None:
        """Gives idle memory back to the system."""
        self._idle.clear()

    def _fitting(self, size: int) -> mmap.mmap | None:
        for memory in sorted(self._idle, key=len):
            if size <= len(memory) <= 2 * size:
                with contextlib.suppress(ValueError):  # another thread was faster
                    self._idle.remove(memory)
                    return memory
        self.drop()
        return None

    def _take_back(self, memory: mmap.mmap) -> None:
        if sum(map(len, self._idle)) + len(memory) <= IDLE:
            self._idle.append(memory)


_ALL: list[weakref.ref[Buffers]] = []  # that of each open checkpoint


def drop_idle() -> None:
    """Gives the idle memory of all checkpoints back to the system."""
    for reference in tuple(_ALL):
        buffers = reference()
        if buffers is not None:
            buffers.drop()


def _pages(size: int) -> mmap.mmap:
    size = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class StreamedFile:
    """A file that tensors are read from, by any thread; it is closed when nothing refers to this object.

    Args:
        path: The file.
        stamp: Of the file, from when its header was read.
        buffers: Where tensors are read into.

    Raises:
        CheckpointError: The file is gone, cannot be read, or is not the one whose header was read.
    """

    def __init__(self, path: str, stamp: FileStamp, buffers: Buffers) -> None:
        self._path, self._stamp, self._buffers = path, stamp, buffers
        self._file = open_unchanged(f"read the weights of {path}", path, stamp)
        self._position = threading.Lock()  # of the file, where it cannot be given with a read
        weakref.finalize(self, self._file.close)

    def view(self, info: TensorInfo, shape: tuple[int, ...], start: int, end: int) -> torch.Tensor:
        """Reads the bytes ``[start, end)``, which are not empty, as a tensor of the dtype of ``info``.

        Raises:
            CheckpointError: The file cannot be read, ends before, or changed since its header was read.
        """
        asked = f"read tensor {info.name!r} in {self._path}"
        lent = self._buffers.lend(end - start)
        self._fill(asked, lent[: end - start], start)
        check_stamp(asked, self._file.fileno(), self._stamp)
        count = (end - start) // info.dtype.itemsize
        return torch.frombuffer(lent, dtype=info.dtype, count=count).view(shape)

    def give_back(self, start: int, end: int) -> None:
        """Nothing is kept of what was read."""

    def _fill(self, asked: str, target: memoryview, start: int) -> None:
        done = 0
        while done < len(target):
            try:
                count = self._read(target[done:], start + done)
            except OSError as error:
                raise CheckpointError(asked, str(error), "a file that can be read") from error
            if not count:
                found = f"the file ends at byte {start + done:,}: it shrank since its header was read"
                raise CheckpointError(asked, found, "open the checkpoint again, once nothing writes to it")
            done += count

    def _read(self, target: memoryview, start: int) -> int:
        if sys.platform != "win32":
            return os.preadv(self._file.fileno(), [target], start)
        with self._position:
            self._file.seek(start)
            return self._file.readinto(target) or 0
