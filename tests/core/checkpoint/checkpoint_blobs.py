"""Safetensors files made by hand, right and wrong, for the tests of this folder."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantport.errors import QuantportError

WHERE = "dir/model.safetensors"


def entry(dtype: str, shape: list[Any], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def blob(header: object, data: bytes = b"") -> bytes:
    """A file of this header (bytes: taken as they are) and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def check_parts(error: QuantportError, *named: str, found: str) -> None:
    """All three parts say something, the message names what it must, and 'found' says what was wrong."""
    assert error.asked
    assert error.found
    assert error.suggestion
    assert found in error.found, error.found
    for name in named:
        assert name in str(error), f"{name!r} is not named in: {error}"


@contextlib.contextmanager
def raises(kind: type[QuantportError], *named: str, found: str) -> Iterator[None]:
    """Like pytest.raises, and checks the three parts with `check_parts`."""
    with pytest.raises(kind) as caught:
        yield
    check_parts(caught.value, *named, found=found)


def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Same dtype, shape and bits."""
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    return torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def weights(
    *names: str, rows: int = 64, columns: int = 64, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """A tensor for each name, all different."""
    generator = torch.Generator().manual_seed(len(names))
    return {name: torch.randn(rows, columns, generator=generator).to(dtype) for name in names}


def sharded(
    directory: Path, shards: dict[str, dict[str, torch.Tensor]], stem: str = "model"
) -> dict[str, str]:
    """Writes shards and an index; returns the weight_map."""
    directory.mkdir(exist_ok=True)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    for file, tensors in shards.items():
        save_file(tensors, directory / file, metadata={"format": "pt"})
    write_index(directory, weight_map, stem)
    return weight_map


def write_index(directory: Path, weight_map: object, stem: str = "model") -> None:
    (directory / f"{stem}.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def stream(*names: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `weights`, as a stream."""
    yield from weights(*names).items()


def only(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))
