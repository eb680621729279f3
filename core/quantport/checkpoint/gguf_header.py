"""The header of a GGUF file, for one question: are its weights quantized? Data is not read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

_FLOATS = frozenset({0, 1, 28, 30})  # GGML_TYPE_F32, F16, F64, BF16
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes, by type of value
_TEXT, _LIST = 8, 9
_MOST_TEXTS = 2_000_000  # in lists; vocabularies and merges have a tenth of it
_MOST_TENSORS = 500_000


def holds_floats(path: Path) -> bool | None:
    """Whether every tensor of a GGUF file is in 16 bits or more; None where its header cannot be read."""
    try:
        with path.open("rb") as file:
            return _types(file) <= _FLOATS
    except (OSError, ValueError, OverflowError, struct.error, KeyError):
        return None


def _types(file: BinaryIO) -> set[int]:
    magic, version, tensors, values = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF" or version not in (2, 3) or tensors > _MOST_TENSORS or values > _MOST_TENSORS:
        raise ValueError("no GGUF header")
    for _ in range(values):
        _skip_text(file)
        _skip_value(file, _number(file, "<I"))
    types = set()
    for _ in range(tensors):
        _skip_text(file)
        file.seek(8 * _number(file, "<I"), 1)
        types.add(_number(file, "<I"))
        file.seek(8, 1)
    return types


def _skip_value(file: BinaryIO, kind: int) -> None:
    if kind == _TEXT:
        _skip_text(file)
    elif kind != _LIST:
        file.seek(_SIZES[kind], 1)
    else:
        inner, count = _number(file, "<I"), _number(file, "<Q")
        if inner != _TEXT:
            file.seek(_SIZES[inner] * count, 1)
        elif count > _MOST_TEXTS:
            raise ValueError("too many texts")
        else:
            for _ in range(count):
                _skip_text(file)


def _skip_text(file: BinaryIO) -> None:
    file.seek(_number(file, "<Q"), 1)


def _number(file: BinaryIO, form: str) -> int:
    (number,) = struct.unpack(form, file.read(struct.calcsize(form)))
    return int(number)
