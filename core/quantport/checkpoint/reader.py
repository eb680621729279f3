"""Reads a checkpoint tensor by tensor: headers first, then the tensors that are asked for."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NoReturn

import torch

from quantport.checkpoint import limits
from quantport.checkpoint.header import Header, TensorInfo, header_length, parse_header
from quantport.checkpoint.layout import Layout, find_layout, some
from quantport.checkpoint.mapping import MappedFile
from quantport.checkpoint.source import Rows
from quantport.checkpoint.stamp import FileStamp, check_stamp, file_stamp
from quantport.checkpoint.streaming import Buffers, StreamedFile
from quantport.errors import CheckpointError, did_you_mean


class Checkpoint:
    """A safetensors checkpoint, open for reading. Make one with `Checkpoint.open`; safe to share between
    threads.

    Attributes:
        directory: Where its files lie.
        files: The safetensors files, sorted by name.
        tensors: Each tensor by name, in the order of its data in the files: reading in this order is
            sequential.
        metadata: ``__metadata__`` of the files, merged; the first file that has a key wins.
        total_bytes: The size of all tensors in bytes.
        mapped: Whether whoever reads a tensor may keep it as a view of its mapped file.
    """

    def __init__(
        self,
        layout: Layout,
        headers: Mapping[str, Header],
        stamps: Mapping[str, FileStamp],
        mapped: bool = False,
    ) -> None:
        self.mapped = mapped
        self.directory = layout.directory
        self.files = layout.files
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(_merge(layout, headers))
        merged: dict[str, str] = {}
        for header in headers.values():
            merged = {**header.metadata, **merged}
        self.metadata: Mapping[str, str] = MappingProxyType(merged)
        self.total_bytes = sum(info.nbytes for info in self.tensors.values())
        self._stamps = dict(stamps)
        self._buffers = Buffers()
        self._open_file: Callable[[str, FileStamp], MappedFile | StreamedFile] = (
            MappedFile if mapped else partial(StreamedFile, buffers=self._buffers)
        )
        self._open_files: dict[str, MappedFile | StreamedFile] = {}
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, headers_only: bool = False, mapped: bool = False
    ) -> Checkpoint:
        """Opens a checkpoint and reads its headers, not its data.

        Args:
            path: A directory in the layout of Transformers or Diffusers, one ``.safetensors`` file, or
                one index.
            headers_only: Accept files that end right after their header, to plan for weights that are not
                here.
            mapped: Read tensors as views of the mapped files, without a copy: whoever reads one may keep it,
                and all processes share its pages. Only for files that nobody writes to: when one shrinks, the
                process dies of SIGBUS.

        Raises:
            CheckpointError: A file is absent, malformed or truncated, or the files and the index disagree.
        """
        layout = find_layout(Path(path))
        if sys.byteorder != "little":
            raise CheckpointError(
                f"open the checkpoint {path}", "a big-endian machine", "a little-endian machine"
            )
        headers: dict[str, Header] = {}
        stamps: dict[str, FileStamp] = {}
        count = 0
        for file in map(str, layout.files):
            headers[file], stamps[file] = _read_header(file, headers_only)
            count += len(headers[file].tensors)
            limits.within(f"open the checkpoint {path}", "tensors", count, limits.MAX_TENSORS)
        return cls(layout, headers, stamps, mapped)

    def read(self, name: str, rows: Rows | None = None) -> torch.Tensor:
        """Reads a tensor, or some of its rows, into memory that is used again once nothing refers to it.

        Of a mapped checkpoint it is a view of the file, read when it is touched: `release` undoes what is
        written to it, and a tensor whose offset is not aligned to its item size is copied.

        Args:
            name: The name of the tensor.
            rows: The rows to read, a slice of step 1 over the first dimension; or a matrix of a 3-D
                tensor and its rows.

        Returns:
            A contiguous CPU tensor of the dtype and shape in the file; with ``rows``, ``shape[0]`` is their
            number.

        Raises:
            CheckpointError: No such tensor or rows, the checkpoint is closed, the data is not there, or its
                file changed since the header was read.
        """
        info = self._info(name, "read")
        start, end, shape = _span(info, rows)
        if start == end:  # torch.frombuffer takes no empty buffer
            return torch.empty(shape, dtype=info.dtype, device="cpu")
        return self._file(info).view(info, shape, start, end)

    def release(self, name: str, rows: Rows | None = None) -> None:
        """Gives the pages of a mapped file back to the system once a tensor, or some of its rows, has been
        used.

        Bounds the memory of a stream at one tensor. Views stay valid: a later access reads the file again.
        Only pages wholly inside are dropped, so neighbours are untouched. Does nothing where the system
        cannot (macOS, Windows), and where files are not mapped: there a tensor is memory of its own.

        Raises:
            CheckpointError: No such tensor or rows.
        """
        info = self._info(name, "release")
        start, end, _ = _span(info, rows)
        with self._lock:
            file = self._open_files.get(info.file)
        if file is not None:
            file.give_back(start, end)

    def verify(self) -> None:
        """Checks that every file is still the one whose header was read, by size, time and inode.

        Raises:
            CheckpointError: one changed or is gone: what was read may be of two checkpoints.
        """
        for file, stamp in self._stamps.items():
            check_stamp(f"read the weights of {file}", file, stamp)

    def close(self) -> None:
        """Lets go of the files. Tensors that were read stay valid."""
        with self._lock:
            self._closed = True
            self._open_files.clear()
        self._buffers.drop()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, name: str, verb: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            suggestion = (
                f"{did_you_mean(name, self.tensors)}one of the {len(self.tensors):,} names in "
                "Checkpoint.tensors"
            )
            raise CheckpointError(
                f"{verb} tensor {name!r} of {self.directory}", "no tensor of this name", suggestion
            )
        return info

    def _file(self, info: TensorInfo) -> MappedFile | StreamedFile:
        """Returns the open file of a tensor, opened on first use."""
        asked = f"read tensor {info.name!r} in {info.file}"
        with self._lock:
            if self._closed:
                raise CheckpointError(
                    asked, "the checkpoint is closed", "read before close(), or open it again"
                )
            if info.end > self._stamps[info.file].size:
                raise CheckpointError(asked, "a file that holds only its header", "the file with its data")
            if info.file not in self._open_files:
                self._open_files[info.file] = self._open_file(info.file, self._stamps[info.file])
            return self._open_files[info.file]


def _read_header(file: str, headers_only: bool) -> tuple[Header, FileStamp]:
    """Reads the header of one file, and the stamp it had."""
    try:
        with open(file, "rb") as stream:
            stamp = file_stamp(stream.fileno())
            start = stream.read(8)
            raw = start + stream.read(header_length(start, stamp.size, file))
    except OSError as error:
        raise CheckpointError(f"read the header of {file}", str(error), "a file that you may read") from error
    return parse_header(raw, stamp.size, file, headers_only=headers_only), stamp


def _span(info: TensorInfo, rows: Rows | None) -> tuple[int, int, tuple[int, ...]]:
    """Returns the byte range in the file and the shape of some rows of a tensor, or of all of it."""
    if rows is None:
        return info.start, info.end, info.shape
    if isinstance(rows, tuple):
        start, end, (count, *shape) = _span(info, slice(rows[0], rows[0] + 1))
        if not count or not shape:
            asked = f"read rows {rows} of tensor {info.name!r} in {info.file}"
            raise CheckpointError(asked, f"shape {list(info.shape)}", "a matrix that it has, and rows of it")
        return _span(replace(info, shape=tuple(shape), start=start, end=end), rows[1])
    if not info.shape or rows.step not in (None, 1):
        found = "a scalar" if not info.shape else f"a slice of step {rows.step}"
        asked = f"read rows {rows} of tensor {info.name!r} in {info.file}"
        raise CheckpointError(asked, found, "a slice of step 1 over a tensor that has rows")
    first, last, _ = rows.indices(info.shape[0])
    last = max(first, last)
    row = info.nbytes // info.shape[0] if info.shape[0] else 0
    return info.start + first * row, info.start + last * row, (last - first, *info.shape[1:])


def _merge(layout: Layout, headers: Mapping[str, Header]) -> dict[str, TensorInfo]:
    """Joins the tensors of all files, and checks them against each other and against the index."""
    merged: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        for name, info in header.tensors.items():
            other = merged.setdefault(name, info)
            if other is not info:
                suggestion = (
                    "files that hold each tensor once: remove the file that does not belong here, or "
                    "pass one file"
                )
                _disagree(layout, f"tensor {name!r} both in {other.file} and in {file}", suggestion)
    if layout.index is not None:
        _check_index(layout, layout.index, merged)
    return merged


def _check_index(layout: Layout, index: Mapping[str, str], merged: Mapping[str, TensorInfo]) -> None:
    """Checks that the index and the headers place the same tensors in the same files."""
    suggestion = f"an index and shards of one save: download or save them again (index: {layout.index_file})"
    absent = [name for name in index if name not in merged]
    if absent:
        _disagree(
            layout,
            f"tensors that the index places in {index[absent[0]]} but no shard holds: {some(absent)}",
            suggestion,
        )
    extra = [name for name in merged if name not in index]
    if extra:
        _disagree(
            layout,
            f"tensors in {merged[extra[0]].file} that the index does not name: {some(extra)}",
            suggestion,
        )
    # once: 46,000 joins take 0.3 s
    paths = {shard: str(layout.directory / shard) for shard in set(index.values())}
    for name, info in merged.items():
        if paths[index[name]] != info.file:
            _disagree(
                layout, f"tensor {name!r} in {info.file}, where the index says {index[name]}", suggestion
            )


def _disagree(layout: Layout, found: str, suggestion: str) -> NoReturn:
    raise CheckpointError(f"open the checkpoint {layout.directory}", found, suggestion)
