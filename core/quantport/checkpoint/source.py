"""The seam for places that tensors come from; `Checkpoint`, for safetensors files, is the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Rows = slice | tuple[int, slice]
"""Rows of a tensor, as a slice of step 1; or a matrix of a 3-D tensor, and rows of it."""


class StoredTensor(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""


@runtime_checkable
class TensorSource(Protocol):
    """Tensors by name, read one at a time. Used by several threads at once."""

    @property
    def directory(self) -> Path:
        """Where the files beside the tensors are, such as ``config.json``; they may be absent."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Each tensor by name, in the order in which reading is fastest."""

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """Returns a tensor, or some of its rows, on the CPU; it is not written to.

        Args:
            name: Name of the tensor.
            rows: As `Rows`; with a matrix of a 3-D tensor, the result has two dimensions.

        Raises:
            CheckpointError: no such tensor or rows, or they cannot be read.
        """

    def release(self, name: str, rows: Rows | None = None) -> None:
        """Frees what reading keeps of a tensor or of some rows, which have been used."""

    def close(self) -> None:
        """Lets go of the files. Tensors that were read stay valid."""


@runtime_checkable
class VerifiedSource(TensorSource, Protocol):
    """A source that can say whether what it reads is still what it was when it was opened."""

    def verify(self) -> None:
        """Checks that nothing changed, before what was read is handed out.

        Raises:
            CheckpointError: names what did.
        """


@contextmanager
def unchanged(source: TensorSource) -> Iterator[None]:
    """Checks after the block that nothing changed that it read; a change also accounts for what it raises.

    Raises:
        CheckpointError: as `VerifiedSource.verify`.
    """
    try:
        yield
    except Exception:  # whatever was raised may be the work of a change, which then says so instead
        _verify(source)
        raise
    _verify(source)


def _verify(source: TensorSource) -> None:
    if isinstance(source, VerifiedSource):
        source.verify()
