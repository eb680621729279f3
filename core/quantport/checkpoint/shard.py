"""Writes one file tensor by tensor: what is in it is known before, so nothing is gathered."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from quantport.checkpoint.header import DTYPES
from quantport.checkpoint.partial import sync
from quantport.errors import SaveError

TensorLayout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each tensor by name, in the order in which they come."""

Stream = Iterable[tuple[str, Tensor]]
"""Names and tensors, one after the other."""

Write = Callable[[str, Tensor], None]
"""Writes a tensor, or the next piece of it; several threads may call it."""

Fill = Callable[[Set[str], Write], None]
"""Writes every tensor of some names, and may write others of the layout with them."""

Head = tuple[bytes, Mapping[str, int], int]
"""What a file begins with, where after that each tensor begins, and the bytes of all that is after it."""


@dataclass(frozen=True)
class OneFile:
    """A file of another format than safetensors, in which every tensor is.

    Attributes:
        name: Of the file in its directory.
        head: What it begins with, and where tensors are in it.
        alone: Whether the file takes the place of the directory: then nothing else is written.
    """

    name: str
    head: Callable[[TensorLayout], Head]
    alone: bool = False


PIECE = 16 << 20  # bytes of a tensor on an accelerator that are on the host at a time
_TAGS = {dtype: tag for tag, dtype in DTYPES.items()}


class ShardWriter:
    """A file that has another name until it is whole. Each tensor may come in several pieces, one after the
    other along its first dimension or along the rows of its matrices, and between pieces of others.

    Args:
        path: Of the file once it is whole; it must not be there.
        layout: The tensors of the file.
        head: What it begins with, and where tensors are in it.
    """

    def __init__(self, path: Path, layout: TensorLayout, head: Head) -> None:
        self._path, self._partial, self._layout = path, path.with_suffix(".tmp"), layout
        self._left = {name: nbytes(*spec) for name, spec in layout.items()}  # bytes that are to come
        self.missing = set(layout)
        header, starts, size = head
        self._next = {name: len(header) + start for name, start in starts.items()}
        self._file = self._partial.open("wb")
        try:
            self._file.truncate(len(header) + size)  # refused at once where the file may not be so large
            self._file.write(header)
        except BaseException:
            self._file.close()
            raise

    def write(self, asked: str, name: str, tensor: Tensor) -> None:
        """Writes a tensor, or the next piece of it.

        Args:
            asked: What was asked, for errors.
            name: One of the layout.
            tensor: Dense, on any device.

        Raises:
            SaveError: its bytes are written already, or it has another dtype or shape than was announced.
        """
        shape, dtype = self._layout[name]
        if name not in self.missing or tensor.nbytes > self._left[name]:
            found = "a name that was not announced" if dtype is None else "this name twice in the stream"
            raise SaveError(
                f"{asked}, tensor {name!r}", found, "each tensor once, in the order of the layout"
            )
        # rows of one matrix of several are a piece too
        within = len(shape) - tensor.dim()
        if tensor.dtype is not dtype or within < 0 or tensor.shape[1:] != shape[within + 1 :]:
            found = f"{list(tensor.shape)} {tensor.dtype}"
            raise SaveError(f"{asked}, tensor {name!r}", found, f"{list(shape)} {dtype}, as announced")
        self._file.seek(self._next[name])
        for piece in _pieces(tensor):
            self._file.write(piece)
        self._next[name] += tensor.nbytes
        self._left[name] -= tensor.nbytes
        if not self._left[name]:
            self.missing.remove(name)

    def finish(self) -> None:
        """Puts the file, which is whole, on the disk under its name."""
        self._file.close()
        sync(self._partial)
        os.rename(self._partial, self._path)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


def cut_layout(layout: TensorLayout, limit: int) -> list[TensorLayout]:
    """Cuts a layout into files of at most ``limit`` bytes; a larger tensor gets a file of its own."""
    shards: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    size = 0
    for name, spec in layout.items():
        if shards[-1] and size + nbytes(*spec) > limit:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += nbytes(*spec)
    return list(shards)


def safetensors_head(layout: TensorLayout, metadata: Mapping[str, str]) -> Head:
    """What a safetensors file with these tensors and this ``__metadata__`` begins with.

    Large items come first, as safetensors has them: then every tensor is aligned.
    """
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(layout, key=lambda name: (-layout[name][1].itemsize, name)):
        shape, dtype = layout[name]
        starts[name], end = end, end + nbytes(shape, dtype)
        tag = _TAGS[dtype]
        dims = [*shape[:-1], 2 * shape[-1]] if tag == "F4" else list(shape)
        entries[name] = {"dtype": tag, "shape": dims, "data_offsets": [starts[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts, end


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, a few at a time: views of it where it is on the host."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    flat = flat.as_strided(flat.shape, (1,))  # one element may have any stride
    step = flat.numel() if flat.device.type == "cpu" else PIECE // flat.element_size()
    for start in range(0, flat.numel(), max(1, step)):
        yield flat[start : start + step].cpu().view(torch.uint8).numpy().data
