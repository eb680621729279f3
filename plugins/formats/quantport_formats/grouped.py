"""What GPTQ, AWQ and their kin share: unsigned codes in int32 words, and for each group of inputs of each
output a scale and an integer zero point, ``value = (code - zero) * scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantport.checkpoint import TensorSource
from quantport.errors import CheckpointError, shown
from quantport.numerics.packing import pack_int4
from quantport.scheme import Scheme
from quantport.scheme.catalog import Schemes

BITS = (2, 3, 4, 8)
_SCALES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_LARGEST_GROUP = 9999  # that an option of a scheme names


@dataclass(frozen=True)
class Grouped:
    """How the codes of a weight ``[n, k]`` are grouped.

    Attributes:
        bits: Of a code.
        n: Outputs.
        k: Inputs.
        group: Inputs that share a scale.
        symmetric: Whether every zero point is said to be the middle of the codes.
    """

    bits: int
    n: int
    k: int
    group: int
    symmetric: bool

    @property
    def middle(self) -> int:
        """The zero point of symmetric codes."""
        return 1 << self.bits - 1

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return -(-self.k // self.group)

    def scheme(self, schemes: Schemes, scales: torch.dtype) -> Scheme | None:
        """The scheme that holds the numbers exactly; None where none does.

        Codes of up to 4 bits are int4 less their middle, and the offset ``(middle - zero) * scale`` is exact
        in fp32 where the scale has 16 bits. Where it has 32, ``code - zero`` is the code: of int8.
        """
        block = "channel" if self.group >= self.k else f"g{self.group}"
        wide = scales is torch.float32
        if scales not in _SCALES or (block != "channel" and self.group > _LARGEST_GROUP):
            return None
        if self.symmetric:
            base = "int8_weight_only" if self.bits == 8 else "int4_weight_only"
            return schemes[f"{base}:{block}:{_SCALES[scales]}"]
        if wide:
            return None if self.bits == 8 else schemes[f"int8_weight_only:{block}:fp32"]
        base = "int8_weight_only" if self.bits == 8 else "int4_weight_only"
        return schemes[f"{base}:{block}:fp32:asym"]

    def stored(self, scheme: Scheme, codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """The tensors of ``scheme.layout``.

        Args:
            scheme: That of `scheme`.
            codes: uint8 ``[rows, k]``; or, of 4 bits, the int32 words of the layout, which are those of the
                unsigned codes.
            zeros: uint8 ``[rows, groups]``.
            scales: ``[rows, groups]``, as stored.
        """
        if scheme.weight.zero_point:
            stored = self._codes(codes)
            factors = scales.float()
            offsets = (self.middle - zeros.to(torch.int32)) * factors
            return {**stored, "weight_scale": factors.contiguous(), "weight_zero": offsets.contiguous()}
        if self.symmetric:
            return {**self._codes(codes), "weight_scale": scales.contiguous()}
        shifted = codes.to(torch.int8) - self.spread(zeros).to(torch.int8)
        return {"weight": shifted, "weight_scale": scales.contiguous()}

    def _codes(self, codes: Tensor) -> dict[str, Tensor]:
        if codes.dtype is torch.int32:
            return {"weight_packed": codes}
        if self.bits == 8:
            return {"weight": codes.bitwise_xor(0x80).view(torch.int8)}
        return {"weight_packed": pack_int4(codes.view(torch.int8) - self.middle)}

    def spread(self, of_groups: Tensor) -> Tensor:
        """One value for each input of those for each group."""
        return of_groups.repeat_interleave(self.group, 1)[:, : self.k]


class Columns:
    """A tensor whose columns are rows of a weight: no column is in one piece in a file, so it is read whole,
    and kept until the last of them was asked for.
    """

    def __init__(self, source: TensorSource, name: str) -> None:
        self._source, self._name = source, name
        self._kept: Tensor | None = None

    def read(self, first: int, last: int) -> Tensor:
        """Columns ``[first, last)``."""
        kept, self._kept = self._kept, None
        whole = self._source.read(self._name) if kept is None else kept
        if last < whole.shape[1]:
            self._kept = whole
        return whole[:, first:last]


def transposed_words(words: Tensor) -> Tensor:
    """Words of eight codes of 4 bits along columns as words along rows: int32 ``[k, words]``, where k is a
    multiple of 8, to ``[words, 8, k / 8]``. Code ``j`` of word ``w`` in row ``8 i + r`` becomes code ``r`` of
    ``[w, j, i]``.
    """
    rows = list(words.view(-1, 8, words.shape[1]).unbind(1))
    for size, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):  # blocks of codes change places
        shift = 4 * size
        for r in range(8):
            if not r & size:
                low, high = rows[r], rows[r | size]
                rows[r] = (low & mask) | (high & mask) << shift
                rows[r | size] = (low >> shift & mask) | (high & ~mask)
    return torch.stack([row.t() for row in rows], 1)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Codes of rows of int32 words, as a stream of bits, low bits first: uint8 ``[rows, words * 32 / bits]``.

    Args:
        words: int32 ``[rows, words]``; of codes of 3 bits a multiple of 3.
        bits: 2, 3, 4 or 8.
    """
    stream = words.contiguous().view(torch.uint8)
    if bits == 8:
        return stream
    if bits != 3:
        parts = [stream >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return torch.stack(parts, -1).flatten(-2)
    a, b, c = stream.view(stream.shape[0], -1, 3).unbind(-1)
    mixed = (a, a >> 3, a >> 6 | b << 2, b >> 1, b >> 4, b >> 7 | c << 1, c >> 2, c >> 5)
    return (torch.stack(mixed, -1) & 7).flatten(-2)


def matrix(source: TensorSource, format_name: str, name: str) -> tuple[int, int]:
    """The shape of a tensor of int32 words.

    Raises:
        CheckpointError: it is absent, or no matrix of int32.
    """
    info = source.tensors.get(name)
    if info is not None and info.dtype is torch.int32 and len(info.shape) == 2 and all(info.shape):
        return info.shape[0], info.shape[1]
    found = "no such tensor" if info is None else f"shape {list(info.shape)}, dtype {info.dtype}"
    raise CheckpointError(
        f"read {name} of {source.directory} as {format_name}", found, "a matrix of int32 words"
    )


def number(config: Mapping[str, Any], format_name: str, *keys: str) -> int | None:
    """A whole number of a configuration, by the first of some keys that it has; None where it has none.

    Raises:
        CheckpointError: it is no whole number.
    """
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if type(value) is not int:
            raise CheckpointError(
                f"read a checkpoint of {format_name}",
                f"{key} {shown(value)}: no whole number",
                "the configuration as it was saved",
            )
        return value
    return None


def group_size(k: int, groups: int, said: int | None) -> int | None:
    """Inputs of a group: as the configuration says where the number of groups agrees, or else as that
    number does; None where neither fits.
    """
    for size in (k if said == -1 else said, k if groups == 1 else None):
        if size is not None and size > 0 and -(-k // size) == groups:
            return size
    return k // groups if k % groups == 0 else None


def no_strays(source: TensorSource, format_name: str, known: set[str], endings: tuple[str, ...]) -> None:
    """Refuses a checkpoint with parts of a weight whose codes are absent.

    Raises:
        CheckpointError: names one.
    """
    for name in source.tensors:
        if name.endswith(endings) and name not in known:
            raise CheckpointError(
                f"read {source.directory} as {format_name}",
                f"{name}, but no codes beside it",
                "the complete checkpoint",
            )
