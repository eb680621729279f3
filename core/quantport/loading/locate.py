"""Where a checkpoint is: a local path, or a snapshot of a model of the hub; and what it holds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantport.checkpoint import (
    BUILTIN_FORMATS,
    CheckpointFormat,
    Recognized,
    TensorSource,
    companions,
    open_by_format,
    open_source,
    read_config,
    recognize,
)
from quantport.checkpoint.layout import OTHER_WEIGHTS, holds_safetensors
from quantport.errors import CheckpointError
from quantport.plugins.registry import Registry
from quantport.scheme.catalog import Schemes

Source = str | os.PathLike[str] | TensorSource


@contextmanager
def open_checkpoint(
    source: Source, registry: Registry, *, headers_only: bool = False
) -> Iterator[tuple[Recognized, dict[str, Any]]]:
    """Opens a checkpoint and recognizes it; closes what it opened.

    Args:
        source: A path, a model id of the hub, or tensors, which stay open.
        registry: Knows formats beside the built-in ones, and schemes.
        headers_only: As for `Checkpoint.open`.

    Yields:
        What it holds, and its ``config.json``, or what its files say in place of that.

    Raises:
        CheckpointError: nothing is there, or no format recognizes it.
    """
    formats = (*BUILTIN_FORMATS, *registry.formats.values())
    if isinstance(source, TensorSource):
        yield _recognized(source, formats, registry.schemes)
        return
    tensors, sound = open_source(locate(source), formats, headers_only=headers_only)
    try:
        yield _recognized(tensors, sound, registry.schemes)
    finally:
        tensors.close()


def _recognized(
    tensors: TensorSource, formats: Sequence[CheckpointFormat], schemes: Schemes
) -> tuple[Recognized, dict[str, Any]]:
    config = read_config(tensors.directory)
    checkpoint = recognize(tensors, config, schemes, formats)
    own = checkpoint.config()
    return checkpoint, config if own is None else dict(own)


def pretrained(path: Path, registry: Registry) -> Mapping[str, str]:
    """The arguments with which ``from_pretrained`` of Transformers finds tokenizer and configuration.

    Raises:
        CheckpointError: the files are those of a format that has them inside, and malformed.
    """
    tensors = None
    if not (path / "config.json").exists():
        tensors = open_by_format(path, (*BUILTIN_FORMATS, *registry.formats.values()), headers_only=True)
    if tensors is None:
        return {"pretrained_model_name_or_path": str(path)}
    try:
        checkpoint, _ = _recognized(tensors, tuple(registry.formats.values()), registry.schemes)
        return checkpoint.pretrained()
    finally:
        tensors.close()


def companions_of(home: str, registry: Registry) -> Mapping[str, bytes | Path]:
    """The files that go with the weights of a model that is saved; none where it came from is gone.

    Args:
        home: The directory, or the file, that the model came from.
        registry: As for `open_checkpoint`.
    """
    path = Path(home)
    if path.is_file():
        with open_checkpoint(path, registry, headers_only=True) as (checkpoint, _):
            return checkpoint.companions()
    return companions(path) if home and path.is_dir() else {}


def locate(source: object) -> Path:
    """A local path, or a snapshot of a model of the hub."""
    if not isinstance(source, str | os.PathLike):
        raise CheckpointError(
            f"open the checkpoint {source!r}",
            f"a {type(source).__name__}",
            "a path, or a model id of the hub",
        )
    path = Path(source)
    text = str(source)
    try:
        if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
            expanded = path.expanduser()
            expanded.exists()
            return expanded
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder of others, no such user
        raise CheckpointError(
            f"open the checkpoint {text[:100]}", f"{type(error).__name__}: {str(error)[:200]}", "another path"
        ) from error
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return path
    try:
        snapshot = Path(snapshot_download(text, ignore_patterns=[f"*{suffix}" for suffix in OTHER_WEIGHTS]))
        if not holds_safetensors(snapshot):  # then what PyTorch wrote
            snapshot_download(text, allow_patterns=["*pytorch_model*.bin", "*pytorch_model*.bin.index.json"])
        return snapshot
    except Exception as error:  # the hub's many errors: network, name, permission
        raise CheckpointError(
            f"load {text!r}",
            f"no such directory, and the hub says: {type(error).__name__}: {str(error).splitlines()[0]}",
            "a local checkpoint directory, or a model id that the hub has and that can be reached",
        ) from error


def named(source: Source) -> str:
    """What a plan calls a checkpoint."""
    return str(source.directory) if isinstance(source, TensorSource) else str(source)
