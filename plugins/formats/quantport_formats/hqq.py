"""HQQ as its layers store themselves in safetensors: ``value = (code - zero) * scale``, where a zero point is
no integer.

Beside a layer: ``W_q``, ``scale``, ``zero``, and what says how they are meant, each a tensor: ``shape``,
``nbits``, ``axis``, ``packing`` ... With ``axis`` 1 a weight is taken as ``[groups, group_size]``, with
``axis`` 0 as ``[group_size, groups]``: those groups lie across rows, and no scheme holds them. Codes are
packed along the first of these dimensions, the first block of rows in the highest bits.

Source: hqq 0.2.8, ``core/quantize.py`` (``Quantizer.dequantize``, ``HQQLinear.state_dict``) and
``core/bitpack.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantport.checkpoint import CheckpointFormat, Coded, CodedTensor, Recognized, TensorSource
from quantport.errors import CheckpointError
from quantport.numerics.packing import pack_int4
from quantport.scheme import Scheme
from quantport.scheme.catalog import Schemes
from quantport_formats.common import held_dtype, need, quant_method

_CODES = ".W_q"
_PACKINGS = {  # bits of a field, fields of a word, words
    "8bit_u8": (8, 1, torch.uint8),
    "4bit_u8": (4, 2, torch.uint8),
    "3bit_32": (3, 10, torch.int32),
    "2bit_u8": (2, 4, torch.uint8),
    "1bit_u8": (1, 8, torch.uint8),
}
_BESIDE_CODES = (
    *("scale", "zero", "shape", "nbits", "axis", "packing", "group_size", "view_as_float"),
    *("unpack_view_dtype", "quant_scale", "quant_zero", "compute_dtype", "offload_meta"),
    *("encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero"),
)


class Hqq(CheckpointFormat):
    """``quant_method: hqq`` with ``W_q``, ``scale`` and ``zero`` beside each other."""

    name = "hqq"

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """As `CheckpointFormat.recognize`."""
        stems = [name.removesuffix(_CODES) for name in source.tensors if name.endswith(_CODES)]
        if not stems or quant_method(config) not in ("hqq", ""):
            return None
        dtype = held_dtype(source, config)
        layers = [_Layer(source, stem) for stem in stems]
        coded = {f"{layer.stem}.weight": layer.coded(schemes, dtype) for layer in layers}
        across = [name for name, weight in coded.items() if weight.scheme is None]
        notices = []
        if len(across) < len(coded):
            notices.append("zero points are held as offsets in fp32: values are within two roundings of fp32")
        if across:
            notices.append(f"{len(across)} weights ({across[0]}, ...) are decoded: groups are across rows")
        return Coded(self.name, source, coded, notices=notices)


class _Layer:
    """One layer, as its small tensors say, which are read.

    Raises:
        CheckpointError: they are absent, or do not fit each other.
    """

    def __init__(self, source: TensorSource, stem: str) -> None:
        self.source, self.stem = source, stem
        if any(self._number(flag) for flag in ("quant_scale", "quant_zero")):
            raise self._refusal("scales that are quantized too", "scales as numbers")
        packing = "".join(map(chr, self._said("packing").flatten().tolist()))
        if packing not in _PACKINGS:
            raise self._refusal(f"packing {packing[:40]!r}", f"one of {', '.join(_PACKINGS)}")
        self.width, self.fields, self.words = _PACKINGS[packing]
        self.bits, self.axis = self._number("nbits"), self._number("axis")
        self.shape = tuple(self._said("shape").tolist())
        if (
            len(self.shape) != 2
            or min(self.shape) < 1
            or not 1 <= self.bits <= self.width
            or self.axis not in (0, 1)
        ):
            found = f"shape {self.shape}, {self.bits} bits, axis {self.axis}"
            raise self._refusal(found, f"a matrix in codes of at most {self.width} bits, axis 0 or 1")
        self.group, self.lines = self._groups()

    def _groups(self) -> tuple[int, int]:
        """Elements of a group, and rows of words, as the shapes of scales and codes have them."""
        n, k = self.shape
        shape = tuple(need(self.source, "hqq", f"{self.stem}.scale").shape)
        count = max(shape, default=0)
        expected = (count, 1) if self.axis else (1, count)
        for key in ("scale", "zero"):
            need(self.source, "hqq", f"{self.stem}.{key}", expected)
        group = n * k // count if count and n * k % count == 0 else 0
        if not group or (k % group if self.axis else count % k):
            raise self._refusal(f"{count} scales for {n} x {k} codes", "whole groups of whole rows")
        rows, columns = (count, group) if self.axis else (group, count)
        lines = -(-rows // self.fields)
        codes = need(self.source, "hqq", f"{self.stem}{_CODES}")
        if codes.shape[0] != lines or codes.nbytes != lines * columns * self.words.itemsize:
            raise self._refusal(
                f"codes of shape {list(codes.shape)}, {codes.nbytes} bytes",
                f"{lines} rows of {columns} words of {self.words}",
            )
        return group, lines

    def coded(self, schemes: Schemes, dtype: torch.dtype) -> CodedTensor:
        """The weight, held in groups of inputs, or decoded."""
        beside = [f"{self.stem}.{key}" for key in _BESIDE_CODES]
        names = (f"{self.stem}{_CODES}", *(name for name in beside if name in self.source.tensors))
        if not self.axis:
            return CodedTensor(self.shape, dtype, None, names, read=self._decoded)
        base = "int4_weight_only" if self.bits <= 4 else "int8_weight_only"
        block = "channel" if self.group == self.shape[1] else f"g{self.group}"
        scheme = schemes[f"{base}:{block}:fp32:asym"]
        return CodedTensor(self.shape, dtype, scheme, names, read=partial(self._stored, scheme))

    def _stored(self, scheme: Scheme, expert: int | None, rows: slice) -> dict[str, Tensor]:
        k, middle = self.shape[1], 1 << self.bits - 1
        each = k // self.group
        groups = slice(rows.start * each, rows.stop * each)
        codes = (self._codes(groups.start, groups.stop).view(-1, k).to(torch.int16) - middle).to(torch.int8)
        scale, zero = (
            self.source.read(f"{self.stem}.{key}", groups).float().view(-1, each) for key in ("scale", "zero")
        )
        stored = {"weight": codes} if self.bits > 4 else {"weight_packed": pack_int4(codes)}
        return {**stored, "weight_scale": scale, "weight_zero": (middle - zero) * scale}

    def _decoded(self, expert: int | None, rows: slice) -> dict[str, Tensor]:
        """Values of some rows, each of which lies in one row of the grouped weight."""
        k, each = self.shape[1], self.shape[0] // self.group
        scale, zero = (self._said(key).float().view(each, k) for key in ("scale", "zero"))
        first = rows.start // each
        codes = self._codes(first, -(-rows.stop // each)).view(-1, each, k)
        values = ((codes - zero) * scale).view(-1, k)
        return {"weight": values[rows.start - first * each : rows.stop - first * each].contiguous()}

    def _codes(self, start: int, stop: int) -> Tensor:
        """Some rows of the grouped weight: uint8 ``[rows, columns]``."""
        return torch.cat(list(self._fields(start, stop)))

    def _fields(self, start: int, stop: int) -> Iterator[Tensor]:
        for field in range(start // self.lines, -(-stop // self.lines)):
            first = field * self.lines
            some = slice(max(start - first, 0), min(stop - first, self.lines))
            words = self.source.read(f"{self.stem}{_CODES}", some).view(
                self.words
            )  # some are stored as floats
            shift = self.width * (self.fields - 1 - field)
            yield (words >> shift & ((1 << self.width) - 1)).to(torch.uint8)

    def _said(self, key: str) -> Tensor:
        need(self.source, "hqq", f"{self.stem}.{key}")
        return self.source.read(f"{self.stem}.{key}")

    def _number(self, key: str) -> int:
        return int(self._said(key).flatten()[0])

    def _refusal(self, found: str, suggestion: str) -> CheckpointError:
        return CheckpointError(f"read {self.stem} of {self.source.directory} as hqq", found, suggestion)
