"""What the header of a GGUF file says: metadata, and where each tensor lies. Data is not read.

Everything that a header claims is checked against limits and against the size of the file before anything is
made of it. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3; types of
tensors: ``ggml_type`` of ``ggml.h``, as gguf 0.19 ``constants.py`` has them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NoReturn

from quantport.checkpoint.limits import MAX_NAME, MAX_TENSORS
from quantport.checkpoint.stamp import FileStamp, file_stamp
from quantport.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_MOST_VALUES = 100_000  # keys; a file has some dozens
_MOST_TEXTS = 4_000_000  # in lists; vocabularies and merges have a tenth of it
_KEPT_TEXT, _KEPT_NUMBERS = 10_000, 10_000  # longer texts and lists are skipped: they are of the tokenizer
_MOST_ALIGNMENT = 1 << 20
_DIMENSIONS = 4
_COMPLETE = "a complete GGUF file: download or convert it again"


@dataclass(frozen=True)
class GgmlType:
    """A type of tensors: blocks of ``block`` elements in ``size`` bytes each."""

    name: str
    block: int
    size: int


TYPES: Mapping[int, GgmlType] = MappingProxyType(
    {
        0: GgmlType("F32", 1, 4),
        1: GgmlType("F16", 1, 2),
        2: GgmlType("Q4_0", 32, 18),
        3: GgmlType("Q4_1", 32, 20),
        6: GgmlType("Q5_0", 32, 22),
        7: GgmlType("Q5_1", 32, 24),
        8: GgmlType("Q8_0", 32, 34),
        10: GgmlType("Q2_K", 256, 84),
        11: GgmlType("Q3_K", 256, 110),
        12: GgmlType("Q4_K", 256, 144),
        13: GgmlType("Q5_K", 256, 176),
        14: GgmlType("Q6_K", 256, 210),
        16: GgmlType("IQ2_XXS", 256, 66),
        17: GgmlType("IQ2_XS", 256, 74),
        18: GgmlType("IQ3_XXS", 256, 98),
        19: GgmlType("IQ1_S", 256, 50),
        20: GgmlType("IQ4_NL", 32, 18),
        21: GgmlType("IQ3_S", 256, 110),
        22: GgmlType("IQ2_S", 256, 82),
        23: GgmlType("IQ4_XS", 256, 136),
        28: GgmlType("F64", 1, 8),
        29: GgmlType("IQ1_M", 256, 56),
        30: GgmlType("BF16", 1, 2),
        34: GgmlType("TQ1_0", 256, 54),
        35: GgmlType("TQ2_0", 256, 66),
        39: GgmlType("MXFP4", 32, 17),
    }
)
"""The types of weights that are read, by number."""


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        shape: As torch has it: the dimension whose elements lie side by side is the last.
        kind: Its type.
        start: Offset of its first byte in the file.
        end: Offset after its last.
    """

    shape: tuple[int, ...]
    kind: GgmlType
    start: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """What the header of one file says.

    Attributes:
        values: Metadata; lists of texts, and what is very long, are left out.
        tensors: By name, in the order of their data.
        stamp: Of the file.
    """

    values: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    stamp: FileStamp


def read_header(path: Path, *, headers_only: bool = False) -> GgufHeader:
    """Reads the header of a file.

    Args:
        path: The file.
        headers_only: Accept a file that ends right after its header.

    Raises:
        CheckpointError: it cannot be read, is no GGUF file of these versions, or what it claims cannot be.
    """
    try:
        with path.open("rb", buffering=1 << 20) as file:
            stamp = file_stamp(file.fileno())
            return _Reader(file, path, stamp).header(headers_only)
    except OSError as error:
        raise CheckpointError(f"read the header of {path}", str(error), "a file that you may read") from error


class _Reader:
    def __init__(self, file: BinaryIO, path: Path, stamp: FileStamp) -> None:
        self.file, self.path, self.stamp, self.at, self.texts = file, path, stamp, 0, 0

    def header(self, headers_only: bool) -> GgufHeader:
        magic = self.take(4)
        if magic != b"GGUF":
            self.bad(f"it begins with {magic!r}, not with b'GGUF'")
        version = self.number("I")
        if version not in (2, 3):
            big = version & 0xFFFF == 0 and version
            self.bad("numbers of a big-endian machine" if big else f"version {version}", "version 2 or 3")
        tensors, values = self.number("Q"), self.number("Q")
        self.within("tensors", tensors, MAX_TENSORS)
        self.within("keys", values, _MOST_VALUES)
        kept: dict[str, Any] = {}
        seen: set[str] = set()
        for _ in range(values):
            key = self.text(MAX_NAME, "key")
            if key in seen:
                self.bad(f"the key {key!r} twice", "each key once")
            seen.add(key)
            value = self.value(self.number("I"), key)
            if value is not None:
                kept[key] = value
        entries = [self.entry() for _ in range(tensors)]
        start = -(-self.at // self.alignment(kept)) * self.alignment(kept)
        return GgufHeader(kept, self.placed(entries, start, self.alignment(kept), headers_only), self.stamp)

    def value(self, kind: int, key: str) -> Any:
        if kind == _TEXT:
            return self.text(_KEPT_TEXT, key, keep=False)
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _LIST:
            self.bad(f"type {kind} of the value of {key[:60]!r}", "one of the 13 types of GGUF")
        inner, count = self.number("I"), self.number("Q")
        if inner == _TEXT:
            self.texts += count
            self.within("texts in lists", self.texts, _MOST_TEXTS)
            for _ in range(count):
                self.skip(self.number("Q"))
            return None
        if inner not in _SCALARS:
            self.bad(f"a list of values of type {inner} under {key[:60]!r}", "a list of numbers or texts")
        size = struct.calcsize(_SCALARS[inner])
        if count > _KEPT_NUMBERS:
            self.skip(size * count)
            return None
        return list(struct.unpack(f"<{count}{_SCALARS[inner]}", self.take(size * count)))

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.text(MAX_NAME, "name of a tensor"), self.number("I")
        if not 1 <= dimensions <= _DIMENSIONS:
            self.bad(f"{dimensions} dimensions of tensor {name!r}", f"1 to {_DIMENSIONS} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return name, shape, self.number("I"), self.number("Q")

    def alignment(self, values: Mapping[str, Any]) -> int:
        found = values.get("general.alignment", 32)
        if type(found) is not int or not 0 < found <= _MOST_ALIGNMENT or found & (found - 1):
            self.bad(f"general.alignment {str(found)[:40]}", f"a power of two up to {_MOST_ALIGNMENT}")
        return found

    def placed(
        self,
        entries: list[tuple[str, tuple[int, ...], int, int]],
        base: int,
        alignment: int,
        headers_only: bool,
    ) -> Mapping[str, GgufTensor]:
        """The tensors in the order of their data, which neither overlap nor lie beyond the file."""
        empty = headers_only and self.stamp.size <= base
        placed: dict[str, GgufTensor] = {}
        for name, shape, number, offset in entries:
            kind = TYPES.get(number)
            if kind is None:
                known = ", ".join(t.name for t in TYPES.values())
                self.bad(f"type {number} of tensor {name!r}", f"a file with tensors of types {known}")
            if name in placed:
                self.bad(f"tensor {name!r} twice", "each tensor once")
            if not all(shape) or shape[-1] % kind.block or math.prod(shape) >= 1 << 60:
                self.bad(f"shape {list(shape)} of {kind.name} tensor {name!r}", "whole blocks in each row")
            size = math.prod(shape) // kind.block * kind.size
            if offset % alignment:
                self.bad(f"tensor {name!r} at {offset}, no multiple of {alignment}", "aligned tensors")
            if base + offset + size > self.stamp.size and not empty:
                self.bad(
                    f"tensor {name!r} ends at byte {base + offset + size:,} of a file of "
                    f"{self.stamp.size:,} bytes: truncated"
                )
            placed[name] = GgufTensor(shape, kind, base + offset, base + offset + size)
        ordered = sorted(placed.items(), key=lambda item: item[1].start)
        for (before, first), (name, second) in pairwise(ordered):
            if second.start < first.end:
                self.bad(f"tensors {before!r} and {name!r} overlap", "tensors side by side in the file")
        return MappingProxyType(dict(ordered))

    def text(self, most: int, what: str, keep: bool = True) -> Any:
        """A text; None for one that is too long, where it need not be kept."""
        length = self.number("Q")
        if length > most:
            if keep:
                self.within(f"bytes of the {what}", length, most)
            self.skip(length)
            return None
        raw = self.take(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.bad(f"{raw[:40]!r} as {what[:60]}, which is not UTF-8", "texts in UTF-8")

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def take(self, count: int) -> bytes:
        self.at += count
        raw = self.file.read(count) if self.at <= self.stamp.size else b""
        if len(raw) < count:
            self.bad(f"its header ends after {self.stamp.size:,} bytes: truncated")
        return raw

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > self.stamp.size:
            self.bad(f"its header ends after {self.stamp.size:,} bytes: truncated")
        self.file.seek(count, 1)

    def within(self, what: str, count: int, most: int) -> None:
        if count > most:
            self.bad(f"{count:,} {what}", f"at most {most:,} {what}")

    def bad(self, found: str, suggestion: str = _COMPLETE) -> NoReturn:
        raise CheckpointError(f"read the header of {self.path}", found, suggestion)
