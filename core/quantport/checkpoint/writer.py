"""Writes a stream of tensors as a sharded checkpoint that Transformers, vLLM and `Checkpoint` can open."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from threading import Lock
from typing import NoReturn

import torch

from quantport.checkpoint.header import DTYPES
from quantport.checkpoint.partial import WHOLE, appearing, sync
from quantport.checkpoint.shard import (
    Fill,
    Head,
    OneFile,
    ShardWriter,
    Stream,
    TensorLayout,
    cut_layout,
    nbytes,
    safetensors_head,
)
from quantport.errors import QuantportError, SaveError

_WRITABLE = frozenset(DTYPES.values())
_RESERVED = (".safetensors", ".safetensors.index.json")


def save_tensors(
    directory: str | os.PathLike[str],
    tensors: Stream | Fill,
    *,
    layout: TensorLayout | None = None,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    files: Mapping[str, bytes | Path] | None = None,
    overwrite: bool = False,
    resume: str = "",
    into: OneFile | None = None,
    stem: str = "model",
) -> Path:
    """Writes a checkpoint that appears under its name complete, or not at all; returns that.

    With ``layout`` it holds the tensor that comes, never more. Without, it holds one shard of tensors and the
    next tensor: then the stream must not write to a tensor that it has yielded.

    Args:
        directory: The final directory: absent, or empty.
        tensors: Names and tensors, one after the other, on any device, of a dtype that safetensors knows. A
            tensor that shares memory with another one is written once for each name. With ``layout`` a tensor
            may come in pieces along its first dimension, each under its name; or this is a function that
            writes them, called with the names that are still to be written and what writes one.
        layout: Shape and dtype of every tensor by name, in the order of the files. Many files are open at a
            time where the stream has another order.
        metadata: Free text for ``__metadata__`` of each shard; ``format`` is ``"pt"`` if not given
            (Transformers asks).
        max_shard_bytes: The size of a shard in bytes; a larger tensor gets a shard of its own.
        files: More files by name, such as ``config.json`` and the tokenizer: what to write, or what to copy.
        overwrite: Replace the checkpoint that is there.
        resume: Names what is written, with everything that its bytes depend on: whole shards that a killed
            save of the same left on this machine are taken over. With ``layout`` only.
        into: The file that takes the place of the shards, with ``layout``; there is nothing to resume.
        stem: What the names of the files of weights begin with.

    Raises:
        SaveError: The name is taken, the disk is full or refuses, a tensor cannot be written, or the stream
            raised. Nothing is left behind. A `QuantportError` of the stream comes through as it is.
    """
    target = Path(directory)
    asked = f"save a checkpoint to {target}"
    with _refusing(asked, target):
        if max_shard_bytes < 1:
            raise SaveError(asked, f"max_shard_bytes={max_shard_bytes}", "a positive number of bytes")
        texts = _checked_metadata(asked, metadata or {})
        same = ""
        if resume and layout is not None and into is None:
            same = _same(resume, layout, max_shard_bytes, texts)
        only = into.name if into and into.alone else ""
        with appearing(target, overwrite=overwrite, resume=same, only=only) as fresh:
            _write_extras(asked, fresh, {} if only else files or {})
            shards = _Shards(asked, fresh, into.head if into else partial(safetensors_head, metadata=texts))
            if layout is None:
                assert not callable(tensors)  # what is still to be written is known of a layout only
                shards.gather(_pull(asked, tensors), max_shard_bytes)
            else:
                shards.stream(layout, tensors, sys.maxsize if into else max_shard_bytes)
            shards.finish(into.name if into else f"{stem}.safetensors", stem)
    return target


class _Shards:
    """Writes shards, and gives them their names at the end."""

    def __init__(self, asked: str, directory: Path, head: Callable[[TensorLayout], Head]) -> None:
        self._asked, self._directory, self._head = asked, directory, head
        self._written: list[TensorLayout] = []

    def stream(self, layout: TensorLayout, tensors: Stream | Fill, limit: int) -> None:
        """Writes tensors as they come."""
        for name, (_, dtype) in layout.items():
            _check_dtype(f"{self._asked}, tensor {name!r}", dtype)
        self._written = cut_layout(layout, limit)
        absent = [i for i in range(len(self._written)) if not self._path(i).exists()]
        place = {name: i for i in absent for name in self._written[i]}
        missing = set(place)
        self._check_space(sum(nbytes(*layout[name]) for name in missing))
        open_files: dict[int, ShardWriter] = {}
        one_at_a_time = Lock()

        def write(name: str, tensor: torch.Tensor) -> None:
            _check(self._asked, name, tensor)
            i = place.get(name)
            if i is None:
                found = "a name that was not announced"
                raise SaveError(f"{self._asked}, tensor {name!r}", found, "the tensors of the layout")
            with one_at_a_time, _refusing(self._asked, self._directory):
                if i not in open_files:
                    file = ShardWriter(self._path(i), self._written[i], self._head(self._written[i]))
                    open_files[i] = stack.enter_context(file)
                open_files[i].write(self._asked, name, tensor)
                if not open_files[i].missing:
                    open_files[i].finish()

        with ExitStack() as stack:
            if callable(tensors):
                with _of_the_stream(self._asked):
                    tensors(missing, write)
            else:
                for name, tensor in _pull(self._asked, tensors):
                    write(name, tensor)
                    del tensor  # while the stream makes the next one, nothing holds this one
            lost = [name for i in absent for name in (open_files[i].missing if i in open_files else place)]
            if lost:
                found = f"a stream that ends before {lost[0]!r} is whole"
                raise SaveError(self._asked, found, "every tensor of the layout")

    def gather(self, stream: Stream, limit: int) -> None:
        """Holds tensors until a shard is full, then writes it."""
        held: dict[str, torch.Tensor] = {}
        names: set[str] = set()
        size = 0
        for name, tensor in stream:
            _check(self._asked, name, tensor)
            if name in names:
                found = "this name twice in the stream"
                raise SaveError(f"{self._asked}, tensor {name!r}", found, "each name once")
            names.add(name)
            if held and size + tensor.nbytes > limit:
                self._write(held)
                held, size = {}, 0
            held[name] = tensor
            size += tensor.nbytes
            del tensor  # while the stream makes the next one, only the shard may hold this one
        if held:
            self._write(held)

    def _write(self, held: Mapping[str, torch.Tensor]) -> None:
        layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()}
        with ShardWriter(self._path(len(self._written)), layout, self._head(layout)) as file:
            for name, tensor in held.items():
                file.write(self._asked, name, tensor)
            file.finish()
        self._written.append(layout)

    def finish(self, single: str, stem: str) -> None:
        """Names the shards, or the single file, and writes the index."""
        if not any(self._written):
            raise SaveError(self._asked, "a stream without a tensor", "at least one tensor")
        count = len(self._written)
        names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        names = names if count > 1 else [single]
        for i, name in enumerate(names):
            os.rename(self._path(i), self._directory / name)
        if count > 1:
            placed = {name: names[i] for i, shard in enumerate(self._written) for name in shard}
            total = sum(nbytes(*spec) for shard in self._written for spec in shard.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
            text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
            _write(self._directory / f"{stem}.safetensors.index.json", text.encode("utf-8"))

    def _check_space(self, needed: int) -> None:
        disk = shutil.disk_usage(self._directory)
        if needed > disk.free and disk.total:  # some file systems in user space know no size
            found = f"it takes {needed / 1e9:.2f} GB; {disk.free / 1e9:.2f} GB are free there"
            raise SaveError(self._asked, found, "free space on that disk, or save elsewhere")

    def _path(self, shard: int) -> Path:
        return self._directory / f".shard-{shard + 1:05d}{WHOLE}"  # hidden, as no companion is


def _same(resume: str, layout: TensorLayout, limit: int, metadata: Mapping[str, str]) -> str:
    """A mark of everything that the bytes of the shards depend on."""
    tensors = [[name, shape, str(dtype)] for name, (shape, dtype) in layout.items()]
    return hashlib.sha256(json.dumps([resume, tensors, limit, dict(metadata)]).encode()).hexdigest()


def _check(asked: str, name: object, tensor: object) -> None:
    """Refuses what is no name, or no dense tensor of a dtype that safetensors can hold."""
    asked = f"{asked}, tensor {name!r}"
    if not isinstance(name, str) or name == "__metadata__":
        raise SaveError(asked, "a name that safetensors cannot hold", "a text other than '__metadata__'")
    if not isinstance(tensor, torch.Tensor):
        raise SaveError(asked, f"a {type(tensor).__name__}", "a torch.Tensor")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = (
            "a tensor without data (device meta)" if tensor.is_meta else f"a tensor of layout {tensor.layout}"
        )
        raise SaveError(asked, kind, "a dense tensor with data")
    _check_dtype(asked, tensor.dtype)


def _check_dtype(asked: str, dtype: torch.dtype) -> None:
    if dtype not in _WRITABLE:
        known = ", ".join(sorted(str(dtype) for dtype in _WRITABLE))
        raise SaveError(asked, f"dtype {dtype}", f"a dtype of the safetensors format: {known}")


@contextmanager
def _of_the_stream(asked: str) -> Iterator[None]:
    """Says of an error that it is none of writing."""
    try:
        yield
    except QuantportError:
        raise
    except Exception as error:  # of whoever makes the tensors: it may raise anything
        found = f"the stream of tensors raised {type(error).__name__}: {error}"
        raise SaveError(asked, found, "a stream of (name, tensor) that ends well") from error


def _pull(asked: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterates a stream, so that what it raises is told apart from what writing raises."""
    stream = iter(tensors)
    while True:
        with _of_the_stream(asked):
            try:
                name, tensor = next(stream)
            except StopIteration:
                return
        yield name, tensor
        del tensor


def _checked_metadata(asked: str, metadata: Mapping[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise SaveError(
                asked, f"metadata {key!r}: {value!r}", "metadata of texts only; use json.dumps for the rest"
            )
    return {"format": "pt", **metadata}


def _write_extras(asked: str, directory: Path, files: Mapping[str, bytes | Path]) -> None:
    """Writes and copies the other files first: they are small, and what is wrong with them shows before the
    stream.
    """
    for name, content in files.items():
        windows = PureWindowsPath(name)
        if (
            not name
            or windows.anchor
            or ".." in windows.parts
            or PurePosixPath(name).is_absolute()
            or "\0" in name
        ):
            raise SaveError(
                f"{asked}, file {name!r}", "a name that leads out of the directory", "a relative file name"
            )
        if name.endswith(_RESERVED):
            raise SaveError(
                f"{asked}, file {name!r}", "a name that the weights need", "only files other than weights"
            )
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            _write(path, content)
        elif content.is_file():
            shutil.copyfile(content, path)
            sync(path)
        else:
            raise SaveError(f"{asked}, file {content}", "no file at this path", "paths of files to copy")


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _refusing(asked: str, target: Path) -> Iterator[None]:
    """Raises SaveError for what the file system raises."""
    try:
        yield
    except QuantportError:
        raise
    except Exception as error:  # safetensors and file systems of others raise more than OSError
        _refuse(asked, target, error)


def _refuse(asked: str, target: Path, error: Exception) -> NoReturn:
    code = error.errno if isinstance(error, OSError) else None
    found, suggestion = f"{type(error).__name__}: {error}", "see the cause above"
    if code in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        found, suggestion = (
            f"the disk is full ({error})",
            f"free space on the disk of {target.absolute().parent}, or save elsewhere",
        )
    elif code in (errno.EACCES, errno.EPERM, errno.EROFS):
        found, suggestion = f"permission denied ({error})", "a directory whose parent you may write to"
    elif code in (errno.EXDEV, errno.EBUSY):
        found, suggestion = (
            f"a directory that cannot be renamed to ({error})",
            "a new directory inside this mount point",
        )
    raise SaveError(asked, found, suggestion) from error
