"""AWQ as AutoAWQ stores it: codes of 4 bits, eight to an int32 word; ``value = (code - zero) * scale``.

``gemm``: ``qweight`` ``[k, n / 8]`` and ``qzeros`` ``[groups, n / 8]`` packed along the outputs, of which
each word takes 0, 2, 4, 6, 1, 3, 5, 7, low bits first; ``scales`` ``[groups, n]``. ``gemv``: ``qweight``
``[n, k / 8]`` and ``qzeros`` ``[n, words]`` packed along the inputs, in order; ``scales`` ``[n, 8 * words]``,
of which those past the last group are not used. Zero points are stored as they are.

Sources: AutoAWQ 0.2.9, ``modules/linear/gemm.py`` and ``gemv.py``, ``utils/packing_utils.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantport.checkpoint import Coded, CodedTensor, Recognized, SavedModel, TensorSource, read_json
from quantport.errors import CheckpointError, shown
from quantport.scheme import Scheme
from quantport.scheme.catalog import Schemes
from quantport_formats.common import held_dtype, need, quant_method, quantizer_config
from quantport_formats.grouped import (
    Columns,
    Grouped,
    group_size,
    matrix,
    no_strays,
    number,
    transposed_words,
    unpacked,
)
from quantport_formats.grouped_write import awq
from quantport_formats.writing import Writing, WrittenFormat

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of each output of eight in its word
_VERSIONS = ("gemm", "gemv")
_BITS = 4


class Awq(WrittenFormat):
    """``quant_method: awq`` in ``config.json``, or ``quant_config.json``; versions ``gemm`` and ``gemv``."""

    name = "awq"

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """As `CheckpointFormat.recognize`."""
        if not any(name.endswith(".qweight") for name in source.tensors):
            return None
        said = quantizer_config(config)
        if not said:
            said = read_json(source.directory / "quant_config.json")
            if "w_bit" not in said:
                return None
        elif quant_method(config) != "awq":
            return None
        version = said.get("version") or said.get("checkpoint_format") or "gemm"
        if not isinstance(version, str) or version.lower() not in _VERSIONS:
            raise CheckpointError(
                f"read {source.directory} as awq",
                f"version {shown(version)}, the layout of one kernel",
                f"version {' or '.join(_VERSIONS)}: save it so with AutoAWQ",
            )
        return read_awq(self.name, source, said, schemes, held_dtype(source, config), version.lower())

    def writing(self, asked: str, model: SavedModel) -> Writing:
        """As `WrittenFormat.writing`."""
        return awq(asked, model)


def read_awq(
    format_name: str,
    source: TensorSource,
    said: Mapping[str, Any],
    schemes: Schemes,
    dtype: torch.dtype,
    version: str = "gemm",
) -> Recognized:
    """A checkpoint with the tensors of AWQ; arguments as of `quantport_formats.gptq.read_gptq`.

    Raises:
        CheckpointError: a tensor is absent, or not what the others and the configuration say.
    """
    bits = number(said, format_name, "bits", "w_bit")
    if bits not in (None, _BITS):
        raise CheckpointError(
            f"read {source.directory} as {format_name}", f"codes of {bits} bits", f"codes of {_BITS} bits"
        )
    size = number(said, format_name, "group_size", "q_group_size")
    stems = [name.removesuffix(".qweight") for name in source.tensors if name.endswith(".qweight")]
    layer = _Gemm if version == "gemm" else _Gemv
    layers = [layer(format_name, source, stem, size) for stem in stems]
    coded = {f"{made.stem}.weight": made.coded(schemes, dtype) for made in layers}
    known = {part for tensor in coded.values() for part in tensor.tensors}
    no_strays(source, format_name, known, (".qzeros",))
    decoded = [name for name, tensor in coded.items() if tensor.scheme is None]
    text = f"{len(decoded)} weights ({', '.join(decoded[:1])}, ...) are decoded: no scheme holds their groups"
    return Coded(format_name, source, coded, notices=(text,) if decoded else ())


class _Layer(ABC):
    """One linear layer, as the shapes of its tensors say."""

    def __init__(self, format_name: str, source: TensorSource, stem: str, size: int | None) -> None:
        self.format_name, self.source, self.stem, self.size = format_name, source, stem, size
        self.qweight, self.qzeros, self.scales = (f"{stem}.{p}" for p in ("qweight", "qzeros", "scales"))
        self.words, self.zeros = (matrix(source, format_name, p) for p in (self.qweight, self.qzeros))
        self.groups = self._groups()
        self.scale_dtype = source.tensors[self.scales].dtype
        if self.scale_dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise self._refusal(f"{self.scales} of {self.scale_dtype}", "scales that are floats")

    @abstractmethod
    def _groups(self) -> Grouped:
        """The groups, as the shapes of the tensors have them."""

    @abstractmethod
    def _parts(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of some rows in words along the inputs, zero points and scales."""

    def coded(self, schemes: Schemes, dtype: torch.dtype) -> CodedTensor:
        names = (self.qweight, self.qzeros, self.scales)
        scheme = self.groups.scheme(schemes, self.scale_dtype)
        read = partial(self._stored, scheme) if scheme else self._decoded
        return CodedTensor((self.groups.n, self.groups.k), dtype, scheme, names, read=read)

    def _stored(self, scheme: Scheme, expert: int | None, rows: slice) -> Mapping[str, Tensor]:
        words, zeros, scales = self._parts(rows)
        codes = words if scheme.weight.format == "int4" else self._codes(words)
        return self.groups.stored(scheme, codes, zeros, scales)

    def _decoded(self, expert: int | None, rows: slice) -> Mapping[str, Tensor]:
        words, zeros, scales = self._parts(rows)
        shifted = self._codes(words).to(torch.int32) - self.groups.spread(zeros).to(torch.int32)
        return {"weight": shifted * self.groups.spread(scales).float()}

    def _codes(self, words: Tensor) -> Tensor:
        return unpacked(words, _BITS)[:, : self.groups.k]

    def _of(self, n: int, k: int, groups: int) -> Grouped:
        group = group_size(k, groups, self.size)
        if group is None:
            raise self._refusal(f"{groups} groups of {k} inputs", "groups of one size")
        return Grouped(_BITS, n, k, group, symmetric=False)

    def _refusal(self, found: str, suggestion: str) -> CheckpointError:
        return CheckpointError(
            f"read {self.stem} of {self.source.directory} as {self.format_name}", found, suggestion
        )


class _Gemm(_Layer):
    def _groups(self) -> Grouped:
        (k, words), (groups, zeros) = self.words, self.zeros
        if words != zeros:
            raise self._refusal(
                f"{self.qweight} [{k}, {words}] and {self.qzeros} [{groups}, {zeros}]", "as many outputs"
            )
        need(self.source, self.format_name, self.scales, (groups, words * 8))
        self._columns = {name: Columns(self.source, name) for name in (self.qweight, self.qzeros)}
        return self._of(words * 8, k, groups)

    def _parts(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        zeros = unpacked(self._words(self.qzeros, rows), _BITS)[:, : self.groups.groups]
        return self._words(self.qweight, rows), zeros, self.source.read(self.scales)[:, rows].t()

    def _words(self, name: str, rows: slice) -> Tensor:
        """Codes of some outputs in words along the inputs, or along the groups."""
        first, last = rows.start // 8, -(-rows.stop // 8)
        words = self._columns[name].read(first, last)
        inputs = torch.nn.functional.pad(words, (0, 0, 0, -words.shape[0] % 8))
        ordered = transposed_words(inputs)[:, _PLACES].flatten(0, 1)
        return ordered[rows.start - 8 * first : rows.stop - 8 * first]


class _Gemv(_Layer):
    def _groups(self) -> Grouped:
        (n, words), (rows, zeros) = self.words, self.zeros
        if n != rows:
            raise self._refusal(
                f"{self.qweight} [{n}, {words}] and {self.qzeros} [{rows}, {zeros}]", "as many outputs"
            )
        need(self.source, self.format_name, self.scales, (n, zeros * 8))
        k = words * 8
        size = k if self.size == -1 else self.size
        if not size or size < 1 or k % size or k // size > zeros * 8:
            raise self._refusal(
                f"group_size {self.size} of {k} inputs, and {zeros * 8} scales", "a size that divides them"
            )
        return self._of(n, k, k // size)

    def _parts(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        groups = self.groups.groups
        zeros = unpacked(self.source.read(self.qzeros, rows), _BITS)
        return (
            self.source.read(self.qweight, rows),
            zeros[:, :groups],
            self.source.read(self.scales, rows)[:, :groups],
        )
