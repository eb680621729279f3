"""Writes a stream of tensors as a sharded checkpoint that Transformers, vLLM and `Checkpoint` can open."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NoReturn

import torch
from safetensors.torch import save_file

from quantport.checkpoint.header import DTYPES
from quantport.checkpoint.partial import appearing, sync
from quantport.errors import QuantportError, SaveError

_WRITABLE = frozenset(DTYPES.values())
_RESERVED = (".safetensors", ".safetensors.index.json")


def save_tensors(
    directory: str | os.PathLike[str],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    files: Mapping[str, bytes | Path] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a checkpoint that appears under its name complete, or not at all; returns its directory.

    Holds one shard of tensors and the next tensor, never more: the stream must not write to a tensor that it
    has yielded.

    Args:
        directory: The final directory: absent, or empty.
        tensors: Names and tensors, one after the other, on any device, of a dtype that safetensors knows. A
            tensor that shares memory with another one is written once for each name.
        metadata: Free text for ``__metadata__`` of each shard; ``format`` is ``"pt"`` if not given
            (Transformers asks).
        max_shard_bytes: The size of a shard in bytes; a larger tensor gets a shard of its own.
        files: More files by name, such as ``config.json`` and the tokenizer: what to write, or what to copy.
        overwrite: Replace the checkpoint that is there.

    Raises:
        SaveError: The name is taken, the disk is full or refuses, a tensor cannot be written, or the stream
            raised. Nothing is left behind. A `QuantportError` of the stream comes through as it is.
    """
    target = Path(directory)
    asked = f"save a checkpoint to {target}"
    try:
        if max_shard_bytes < 1:
            raise SaveError(asked, f"max_shard_bytes={max_shard_bytes}", "a positive number of bytes")
        texts = _checked_metadata(asked, metadata or {})
        with appearing(target, overwrite=overwrite) as partial:
            _write_extras(asked, partial, files or {})
            shards = _Shards(asked, partial, max_shard_bytes, texts)
            for name, tensor in _pull(asked, tensors):
                shards.add(name, tensor)
                del tensor  # while the stream makes the next one, only the shard may hold this one
            shards.finish()
    except QuantportError:
        raise
    except Exception as error:
        _refuse(asked, target, error)
    return target


class _Shards:
    """Gathers tensors, writes a shard when it is full, and gives the shards their names at the end."""

    def __init__(self, asked: str, directory: Path, limit: int, metadata: dict[str, str]) -> None:
        self._asked, self._directory, self._limit, self._metadata = asked, directory, limit, metadata
        self._held: dict[str, torch.Tensor] = {}
        self._held_bytes = 0
        self._storages: set[int] = set()
        self._shard_of: dict[str, int] = {}
        self._count = 0
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes a tensor; writes the shard that it does not fit into any more."""
        if name in self._shard_of:
            raise SaveError(
                f"{self._asked}, tensor {name!r}", "this name twice in the stream", "each name once"
            )
        ready = _ready(self._asked, name, tensor)
        size = ready.numel() * ready.element_size()
        if self._held and self._held_bytes + size > self._limit:
            self._flush()
        storage = ready.untyped_storage().data_ptr()
        # tied weights: safetensors writes no two names of one memory
        if ready.numel() and storage in self._storages:
            ready = ready.clone()
            storage = ready.untyped_storage().data_ptr()
        self._storages.add(storage)
        self._held[name] = ready
        self._held_bytes += size
        self._total_bytes += size
        self._shard_of[name] = self._count

    def finish(self) -> None:
        """Writes the last shard, then names all of them and writes the index."""
        if not self._shard_of:
            raise SaveError(self._asked, "a stream without a tensor", "at least one tensor")
        self._flush()
        width = f"-of-{self._count:05d}"
        names = [f"model-{i + 1:05d}{width}.safetensors" for i in range(self._count)]
        names = names if self._count > 1 else ["model.safetensors"]
        for i, name in enumerate(names):
            os.rename(self._path(i), self._directory / name)
        if self._count > 1:
            weight_map = {name: names[shard] for name, shard in sorted(self._shard_of.items())}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
            _write(self._directory / "model.safetensors.index.json", text.encode("utf-8"))

    def _flush(self) -> None:
        path = self._path(self._count)
        save_file(self._held, path, metadata=self._metadata)
        # what the umask gives; safetensors 0.8 makes it 0600
        path.chmod(self._directory.stat().st_mode & 0o666)
        sync(path)
        self._held, self._held_bytes, self._storages = {}, 0, set()
        self._count += 1

    def _path(self, shard: int) -> Path:
        return self._directory / f"shard-{shard + 1:05d}.tmp"


def _ready(asked: str, name: object, tensor: object) -> torch.Tensor:
    """Returns a dense, contiguous CPU tensor of a dtype that safetensors can hold, or raises SaveError."""
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
    if tensor.dtype not in _WRITABLE:
        known = ", ".join(sorted(str(dtype) for dtype in _WRITABLE))
        raise SaveError(asked, f"dtype {tensor.dtype}", f"a dtype of the safetensors format: {known}")
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def _pull(asked: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterates a stream, so that what it raises is told apart from what writing raises."""
    stream = iter(tensors)
    while True:
        try:
            name, tensor = next(stream)
        except StopIteration:
            return
        except QuantportError:
            raise
        except Exception as error:
            found = f"the stream of tensors raised {type(error).__name__}: {error}"
            raise SaveError(asked, found, "a stream of (name, tensor) that ends well") from error
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


def _refuse(asked: str, target: Path, error: Exception) -> NoReturn:
    """Raises SaveError for what the file system or safetensors raised."""
    code = error.errno if isinstance(error, OSError) else None
    match = re.search(r"os error (\d+)", str(error))  # safetensors wraps the OSError in a text of its own
    code = int(match[1]) if code is None and match else code
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
