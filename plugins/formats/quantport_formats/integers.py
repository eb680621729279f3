"""Integers of 1 to 8 bits with scales and zero points, as compressed-tensors stores them.

Source: compressed-tensors 0.20, ``compressors/pack_quantized/base.py``, ``naive_quantized/base.py`` and
``_dequantize`` in ``quantization/lifecycle/forward_helpers.py``: ``value = (code - zero point) * scale``.
Codes and zero points are packed as ``value + 2 ** (bits - 1)``, zero points along the rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantport.checkpoint import TensorSource
from quantport.errors import CheckpointError
from quantport.numerics.packing import pack_int4
from quantport.scheme.scheme import ORDER
from quantport_formats.bit_streams import unpack, words_for
from quantport_formats.common import activation_order, need
from quantport_formats.compressed_tensors_config import Args
from quantport_formats.pieces import SCALES, Piece, piece, wanted


class Integers:
    """The integers of one module.

    Args:
        format_name: For errors.
        source: The tensors.
        module: Whose weight it is.
        args: What they are.
        spare_zeros: Whether symmetric ones have zero points too, all of them 0.

    Attributes:
        shape: ``(n, k)``.
        codes: Name of the tensor of codes.
        scales: Name of that of scales.
        tensors: All that it takes.
        wide: Whether they are held in 8 bits, and not in 4.
        key: Name of the codes in the layout of schemes.
        block: Option of a scheme: what shares a scale.
        scale: Dtype of the scales as they are held.
        offsets: Whether zero points are held as offsets.
        ordered: Whether they are in activation order.
        as_stored: Whether codes and scales are those of the layout.
        notices: What is held in another way than it is stored.

    Raises:
        CheckpointError: a tensor is absent, or not what it should be.
    """

    def __init__(
        self, format_name: str, source: TensorSource, module: str, args: Args, spare_zeros: bool = False
    ) -> None:
        self._spare_zeros = spare_zeros
        self._format, self._source, self._module, self._args = format_name, source, module, args
        self._packed = f"{module}.weight_packed" in source.tensors
        self.codes, self.scales = f"{module}.weight{'_packed' * self._packed}", f"{module}.weight_scale"
        self._zero, self._index = f"{module}.weight_zero_point", f"{module}.weight_g_idx"
        self.ordered = self._index in source.tensors
        self.shape = self._shape()
        stored = self._checked()
        # products of a zero point and a scale are exact in fp32 unless the scale has all of its bits
        self._folded = not args.symmetric and stored is torch.float32 and args.bits < 8
        self.offsets = not args.symmetric and not self._folded
        self.wide = args.bits > 4 or self._folded
        self.key = "weight" if self.wide else "weight_packed"
        self.scale = torch.float32 if self.wide or self.offsets else stored
        self.block = {"tensor": "tensor", "channel": "channel"}.get(args.strategy, f"g{args.group}")
        alike = args.bits == 4 if self._packed and not self.wide else not self._packed and self.wide
        self.as_stored = args.symmetric and alike and not self.ordered
        self.tensors = tuple(name for name in self._names() if name in source.tensors)
        self.notices = list(self._said(stored))

    def _names(self) -> tuple[str, ...]:
        return self.codes, self.scales, self._zero, self._index, f"{self._module}.weight_shape"

    def _said(self, stored: torch.dtype) -> Iterator[str]:
        held = 8 if self.wide else 4
        if self._folded:
            yield (
                f"{self._args.bits}-bit codes with zero points are held in 8 bits: no offset is exact beside "
                "fp32 scales"
            )
        elif held != self._args.bits:
            yield f"{self._args.bits}-bit codes are held in {held} bits"
        if self.offsets and stored is torch.float32:
            yield "8-bit zero points with fp32 scales: values are within two roundings of fp32"

    def _shape(self) -> tuple[int, int]:
        info = need(self._source, self._format, self.codes)
        dtype = torch.int32 if self._packed else torch.int8
        if len(info.shape) != 2 or info.dtype is not dtype or not all(info.shape):
            raise self._wrong(
                f"{self.codes} of shape {list(info.shape)}, dtype {info.dtype}", f"a matrix of {dtype}"
            )
        n, k = info.shape
        if self._packed:
            scale = need(self._source, self._format, self.scales).shape
            grouped = self._args.strategy == "group" and len(scale) == 2
            k = scale[1] * self._args.group if grouped else info.shape[1] * 32 // self._args.bits
            if words_for(k, self._args.bits) != info.shape[1]:
                raise self._wrong(
                    f"{self.codes} has rows of {info.shape[1]} words, {self.scales} {list(scale)}",
                    f"{words_for(k, self._args.bits)} words for {k} codes of {self._args.bits} bits",
                )
        if self._args.strategy == "group" and k % self._args.group:
            raise self._wrong(
                f"{self.codes} has {k} columns, in groups of {self._args.group}", "whole groups"
            )
        return n, k

    def _wrong(self, found: str, suggestion: str) -> CheckpointError:
        return CheckpointError(f"read {self._source.directory} as {self._format}", found, suggestion)

    def _checked(self) -> torch.dtype:
        """Checks everything beside the codes; the dtype of the scales."""
        n, k = self.shape
        groups = k // self._args.group if self._args.strategy == "group" else 1
        whole = self._args.strategy == "tensor"
        shapes: list[tuple[int, ...]] = [(1,), (), (1, 1)] if whole else [(n, groups)]
        shapes += [(n,)] if self._args.strategy == "channel" else []
        dtype = wanted(self._source, self._format, self.scales, shapes, SCALES)
        if not self._args.symmetric:
            packed = self._packed and not whole
            shape = [(words_for(n, self._args.bits), groups)] if packed else shapes
            wanted(
                self._source,
                self._format,
                self._zero,
                shape,
                [torch.int32, *([] if packed else [torch.int8])],
            )
        elif self._zero in self._source.tensors and not self._spare_zeros:
            raise self._wrong(f"{self._zero} beside symmetric weights", "symmetric: false, or no zero points")
        if self.ordered:
            if self._args.strategy != "group":
                raise self._wrong(f"{self._index} without groups", "strategy group, or no such tensor")
            wanted(self._source, self._format, self._index, [(k,)], [torch.int32, torch.int64])
        return dtype

    def pieces(self) -> dict[str, Piece]:
        """What makes the tensors of the layout."""
        scales = piece(self._source, self.scales, self._args.strategy != "tensor")
        out: dict[str, Piece] = {self.key: self._read_codes, "weight_scale": scales}
        if self.offsets:
            out["weight_zero"] = self._read_offsets
        if self.ordered:
            out[ORDER] = lambda _: self._order()
        return out

    def _read_codes(self, rows: slice) -> Tensor:
        bits, half = self._args.bits, 1 << self._args.bits - 1
        stored = self._source.read(self.codes, rows)
        if self._packed and bits == 4 and not self.wide and not self.ordered:
            return stored
        codes = unpack(stored, bits, self.shape[1]).int() - half if self._packed else stored.int()
        if not self._packed and bits < 8 and codes.numel() and not -half <= codes.min() <= codes.max() < half:
            raise self._wrong(
                f"{self.codes} has codes from {int(codes.min())} to {int(codes.max())}",
                f"codes of {bits} bits",
            )
        if self.ordered:
            codes = codes[:, self._order()]
        if self._folded:
            codes = codes - self._over_columns(self._read_zeros(rows))
        return codes.to(torch.int8) if self.wide else pack_int4(codes.to(torch.int8))

    def _read_offsets(self, rows: slice) -> Tensor:
        zeros = self._read_zeros(rows)
        scale = piece(self._source, self.scales, self._args.strategy != "tensor")(rows).float()
        return -zeros.float() * scale.reshape(zeros.shape)

    def _read_zeros(self, rows: slice) -> Tensor:
        """Zero points of some rows: int32 ``[rows, groups]``."""
        bits = self._args.bits
        if not self._packed or self._args.strategy == "tensor":
            stored = piece(self._source, self._zero, self._args.strategy != "tensor")(rows)
            return stored.int().reshape(1 if self._args.strategy == "tensor" else len(stored), -1)
        first = rows.start // 32 * 32  # 32 codes are whole words
        words = self._source.read(
            self._zero,
            slice(first // 32 * bits, min(-(-rows.stop // 32) * bits, words_for(self.shape[0], bits))),
        )
        codes = unpack(words.T, bits, rows.stop - first).T[rows.start - first :]
        return codes.int() - (1 << bits - 1)

    def _over_columns(self, zeros: Tensor) -> Tensor:
        return zeros.repeat_interleave(-(-self.shape[1] // zeros.shape[1]), 1)[:, : self.shape[1]]

    def _order(self) -> Tensor:
        """The columns in the order of their groups.

        Raises:
            CheckpointError: a group that is not there, or is of another size.
        """
        group, count = self._args.group, self.shape[1] // self._args.group
        order = activation_order(self._source.read(self._index).long(), group)
        if order is None:
            raise self._wrong(f"{self._index} of other groups", f"groups 0 to {count - 1} of {group} columns")
        return order
