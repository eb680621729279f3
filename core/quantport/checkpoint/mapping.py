"""One file, mapped privately: tensors are views of its pages, and pages can be given back.

For files that nobody writes to: where one shrinks, the next touch of a page that is gone ends the process
with SIGBUS.

No ``MADV_SEQUENTIAL`` and no ``MADV_WILLNEED``: on cold 1 GiB files both were 5 to 15 percent slower than the
default read-ahead, whether the tensors were only read or worked on (2026-11, virtio disk, Linux 6).
"""

from __future__ import annotations

import mmap
import sys

import torch

from quantport.checkpoint.header import TensorInfo
from quantport.checkpoint.stamp import FileStamp, open_unchanged
from quantport.errors import CheckpointError


class MappedFile:
    """A private (copy-on-write) mapping of a whole file, which lives as long as a view of it does.

    Args:
        path: The file.
        stamp: Of the file, from when its header was read.

    Raises:
        CheckpointError: The file is gone, cannot be mapped, or is not the one whose header was read.
    """

    def __init__(self, path: str, stamp: FileStamp) -> None:
        asked = f"map the weights of {path}"
        with open_unchanged(asked, path, stamp) as file:
            try:
                self._map = _map_private(file.fileno(), stamp.size)
            except OSError as error:
                raise CheckpointError(asked, str(error), "a file that can be memory-mapped") from error

    def view(self, info: TensorInfo, shape: tuple[int, ...], start: int, end: int) -> torch.Tensor:
        """Returns the bytes ``[start, end)``, which are not empty, as a tensor of the dtype of ``info``.

        A view of the mapping, or a copy if ``start`` is no multiple of the item size: kernels load whole
        elements, and a misaligned load is slow or a fault on some devices. Writers since safetensors 0.3
        align the data.
        """
        dtype = info.dtype
        if start % dtype.itemsize:
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=end - start, offset=start)
            return raw.clone().view(dtype).view(shape)
        count = (end - start) // dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(shape)

    def give_back(self, start: int, end: int) -> None:
        """Drops the pages that lie wholly in ``[start, end)`` from memory; the next access reads the file
        again.

        Only on Linux: elsewhere ``MADV_DONTNEED`` is a hint with another meaning (macOS) or missing
        (Windows).
        """
        page = mmap.PAGESIZE
        first, last = -(-start // page) * page, end // page * page
        if sys.platform == "linux" and first < last:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


def _map_private(descriptor: int, size: int) -> mmap.mmap:
    """Maps a file copy-on-write, writable so that PyTorch takes it; nobody's writes reach the file.

    On Linux without a reservation of swap: with one, a file larger than the memory of the machine is refused
    ("Cannot allocate memory") although its pages are never written.
    """
    if sys.platform == "linux":
        # named since Python 3.11; one value on all but Alpha, MIPS, SPARC
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
        flags = mmap.MAP_PRIVATE | no_reserve
        return mmap.mmap(descriptor, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
