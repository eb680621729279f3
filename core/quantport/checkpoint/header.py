"""The header of a safetensors file, parsed from bytes and trusted in nothing.

Format (https://huggingface.co/docs/safetensors/index#format): 8 bytes, the little-endian length N; N bytes of
UTF-8 JSON that map each name to ``{"dtype", "shape", "data_offsets": [begin, end]}``; then the data, which
the tensors must cover without a hole or an overlap, to the last byte of the file.

Stricter than the safetensors library on four points: a name that is there twice is an error (the library
keeps one), a dimension must fit in the int64 of PyTorch, a dtype must exist in this PyTorch, and each entry
must be a JSON object.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

import torch

from quantport.checkpoint import limits
from quantport.checkpoint.json import parse_object
from quantport.errors import CheckpointError, did_you_mean

_MAX_INT64 = 2**63 - 1
_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
}
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {k: getattr(torch, v) for k, v in _NAMES.items() if hasattr(torch, v)}
)
"""The dtype names of the format that this PyTorch knows."""

_COMPLETE = "a complete safetensors file: download or save it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in a file.

    Attributes:
        name: The name of the tensor.
        dtype: Its PyTorch dtype.
        shape: Its shape in PyTorch. For ``F4``, of which PyTorch packs two in an element of
            ``float4_e2m1fn_x2``, the last dimension is half of the one in the file, as in
            ``safetensors.safe_open``.
        start: Offset of the first byte, from the start of the file.
        end: Offset after the last byte, from the start of the file.
        file: The path of the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    file: str

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of one file says.

    Attributes:
        tensors: Each tensor by its name, in the order of the data in the file.
        metadata: The free text of ``__metadata__``.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def header_length(raw: bytes, file_size: int, where: str) -> int:
    """Returns the length in bytes of the JSON header.

    Args:
        raw: The start of the file, at least 8 bytes if the file has them.
        file_size: The size of the file in bytes.
        where: The path of the file, for errors.

    Raises:
        CheckpointError: The file is shorter than its header says, or is no safetensors file.
    """
    if len(raw) < 8 or file_size < 8:
        _bad(
            where,
            f"{min(len(raw), file_size)} bytes; a safetensors file starts with the 8-byte length of "
            "its header",
        )
    if raw[:8] == b"version ":
        _bad(where, "the text of a Git LFS pointer, not the weights", "run 'git lfs pull' in the repository")
    length = int.from_bytes(raw[:8], "little")
    if length > file_size - 8:
        _bad(
            where,
            f"a header of {length:,} bytes in a file of {file_size:,} bytes: truncated, or no "
            "safetensors file",
        )
    limits.within(f"read the header of {where}", "bytes of header", length, limits.MAX_HEADER_BYTES)
    return length


def parse_header(raw: bytes, file_size: int, where: str, *, headers_only: bool = False) -> Header:
    """Parses the header of a safetensors file and checks all that it claims.

    Args:
        raw: The start of the file: the 8-byte length and the JSON, or more (the rest is not looked at).
        file_size: The size of the file in bytes.
        where: The path of the file; errors name it and each `TensorInfo` carries it.
        headers_only: Also accept a file that ends right after its header (a plan needs no data).

    Returns:
        The tensors, in the order of their data, and the metadata.

    Raises:
        CheckpointError: The header is malformed, or what it claims does not fit the file.
    """
    length = header_length(raw, file_size, where)
    if len(raw) < 8 + length:
        _bad(where, f"{len(raw):,} bytes of a header of {8 + length:,} bytes", "pass the whole header")
    fields = parse_object(raw[8 : 8 + length], f"read the header of {where}", "a header", _COMPLETE)
    metadata = _metadata(fields.pop("__metadata__", None), where)
    infos = [_tensor_info(name, entry, 8 + length, where) for name, entry in fields.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    _check_cover(infos, 8 + length, file_size, headers_only, where)
    return Header(MappingProxyType({info.name: info for info in infos}), MappingProxyType(metadata))


def _metadata(found: object, where: str) -> dict[str, str]:
    """Checks ``__metadata__``: absent, null, or an object of strings."""
    if found is None:
        return {}
    if type(found) is not dict:
        _bad(where, f"__metadata__ that is a {type(found).__name__}", "__metadata__ as an object of strings")
    for key, value in found.items():
        if type(value) is not str:
            _bad(
                where,
                f"__metadata__[{key!r}] that is a {type(value).__name__}",
                "__metadata__ as an object of strings",
            )
    return found


def _tensor_info(name: str, entry: object, base: int, where: str) -> TensorInfo:
    """Checks one entry of the header on its own; offsets in it count from ``base``."""
    if type(entry) is not dict:
        _bad(
            where,
            f"an entry that is a {type(entry).__name__}",
            "an object with dtype, shape and data_offsets",
            name,
        )
    tag, dims, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    dtype = DTYPES.get(tag) if type(tag) is str else None
    if dtype is None:
        hint = did_you_mean(tag, DTYPES) if type(tag) is str else ""
        _bad(where, f"dtype {str(tag)[:40]!r}", f"{hint}known to this PyTorch: {', '.join(DTYPES)}", name)
    if type(dims) is not list or not _whole(dims):
        _bad(where, f"shape {str(dims)[:80]}", f"a list of whole numbers from 0 to {_MAX_INT64}", name)
    if type(offsets) is not list or len(offsets) != 2 or not _whole(offsets) or offsets[0] > offsets[1]:
        _bad(
            where,
            f"data_offsets {str(offsets)[:80]}",
            "two whole numbers [begin, end] with begin <= end",
            name,
        )
    shape, (begin, end) = tuple(dims), offsets
    if tag == "F4":
        if not shape or shape[-1] % 2:
            _bad(
                where,
                f"F4 of shape {dims}, whose last dimension does not pack in pairs",
                "an even last dimension",
                name,
            )
        shape = (*shape[:-1], shape[-1] // 2)
    if math.prod(d for d in shape if d) * dtype.itemsize > _MAX_INT64:
        _bad(
            where, f"shape {str(dims)[:80]}, whose size overflows 64 bits", "a tensor below 2**63 bytes", name
        )
    size = math.prod(shape) * dtype.itemsize
    if size != end - begin:
        _bad(where, f"{end - begin:,} bytes for {tag} of shape {dims}, which takes {size:,}", _COMPLETE, name)
    return TensorInfo(name, dtype, shape, base + begin, base + end, where)


def _whole(values: Iterable[object]) -> bool:
    return all(type(v) is int and 0 <= v <= _MAX_INT64 for v in values)  # type() since a bool is an int


def _check_cover(infos: list[TensorInfo], base: int, file_size: int, headers_only: bool, where: str) -> None:
    """Checks that tensors, sorted by place, cover the data of the file: no hole, no overlap, nothing after
    the last.
    """
    cursor, last = base, "the header"
    for info in infos:
        if info.start < cursor:
            _bad(
                where,
                f"it overlaps {last} by {cursor - info.start:,} bytes",
                "tensors side by side in the file",
                info.name,
            )
        if info.start > cursor:
            _bad(
                where,
                f"a hole of {info.start - cursor:,} bytes after {last}",
                "tensors side by side in the file",
                info.name,
            )
        cursor, last = info.end, repr(info.name)
    if headers_only and file_size == base:
        return
    if cursor > file_size:
        cut = next(info for info in infos if info.end > file_size)
        _bad(
            where,
            f"it ends at byte {cut.end:,} of a file of {file_size:,} bytes: truncated",
            _COMPLETE,
            cut.name,
        )
    if cursor < file_size:
        _bad(where, f"{file_size - cursor:,} bytes after {last}, which no tensor claims", _COMPLETE)


def _bad(where: str, found: str, suggestion: str = _COMPLETE, tensor: str | None = None) -> NoReturn:
    """Raises the error of this module, which names the file and, where there is one, the tensor."""
    asked = (
        f"read the header of {where}"
        if tensor is None
        else f"read the header of tensor {tensor!r} in {where}"
    )
    raise CheckpointError(asked, found, suggestion)
