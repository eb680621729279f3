"""Checkpoints whose weights are stored as codes, read as if they were not: what a format names a
`CodedTensor` looks like a weight in 16 bits to all that plan and quantize, and gives its codes to those who
keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from quantport.checkpoint.format import KVCacheConfig, QuantizedWeight, Recognized
from quantport.checkpoint.plain_format import refuse_codes
from quantport.checkpoint.source import Rows, StoredTensor, TensorSource, VerifiedSource
from quantport.errors import CheckpointError
from quantport.model.layers import Layer, Part, find_layers
from quantport.model.stored_experts import alternating
from quantport.numerics import dequantize_weight
from quantport.numerics.by_rows import rows_of_step, stored_slices
from quantport.numerics.sharding import alignment
from quantport.scheme import Scheme

TOGETHER = (
    1 << 20
)  # elements that are decoded at a time: fewer take longer for the calls, more for fresh memory

ReadCodes = Callable[[int | None, slice], Mapping[str, Tensor]]
"""The tensors of ``scheme.layout`` for some rows of a matrix, or of a matrix of a stack."""


@dataclass(frozen=True)
class CodedTensor:
    """A weight that a checkpoint stores as codes: a matrix ``[n, k]`` or a stack ``[experts, n, k]``.

    Attributes:
        shape: Of the weight.
        dtype: In which a model holds it that does not quantize it.
        scheme: What its numbers are; None where no scheme holds them: the weight can only be decoded.
        tensors: The stored tensors that it is made of.
        keys: For each key of ``scheme.layout`` the stored tensor that it is as it stands, of a matrix; empty
            where ``read`` makes them.
        read: Makes the tensors of ``scheme.layout`` for rows that begin and end with blocks of the scheme;
            None where ``keys`` names them. Without a scheme it gives any rows, as fp32 ``weight``.
        values: The values of any rows, in fp32, where the format rounds them otherwise than the scheme; None
            where they are the same.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    scheme: Scheme | None
    tensors: tuple[str, ...]
    keys: Mapping[str, str] = field(default_factory=dict)
    read: ReadCodes | None = None
    values: Callable[[int | None, slice], Tensor] | None = None


@dataclass(frozen=True)
class _Entry:
    """What a source says of a coded tensor: the shape of the weight, and the bytes of its codes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class DecodedSource:
    """A `TensorSource` in which coded tensors stand as weights, and the tensors that they are made of are not
    listed; those can still be read.

    Args:
        source: Where everything is read.
        coded: The coded tensors, by the name of the weight.
        unlisted: Further stored tensors that are no part of the model.
    """

    def __init__(
        self, source: TensorSource, coded: Mapping[str, CodedTensor], unlisted: Iterable[str] = ()
    ) -> None:
        self.source, self.coded = source, coded
        self.mapped: bool = bool(getattr(source, "mapped", False))
        first = {tensor.tensors[0]: name for name, tensor in coded.items()}
        hidden = {name for tensor in coded.values() for name in tensor.tensors} | set(unlisted)
        tensors: dict[str, StoredTensor] = {}
        for name, info in source.tensors.items():
            if name in first:
                weight = coded[first[name]]
                size = sum(source.tensors[part].nbytes for part in weight.tensors)
                tensors[first[name]] = _Entry(weight.shape, weight.dtype, size)
            elif name not in hidden:
                tensors[name] = info
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(tensors)

    @property
    def directory(self) -> Path:
        """As of the source."""
        return self.source.directory

    @property
    def files(self) -> Any:
        """As of the source, which may have none."""
        return getattr(self.source, "files", ())

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """As `TensorSource.read`; the values of a coded tensor are fp32, exactly as its codes have them."""
        tensor = self.coded.get(name)
        if tensor is None:
            return self.source.read(name, rows)
        if len(tensor.shape) == 2:
            assert not isinstance(rows, tuple)  # a matrix has no matrices
            return self._values(name, tensor, None, rows or slice(None))
        if isinstance(rows, tuple):
            return self._values(name, tensor, *rows)
        experts = range(*(rows or slice(None)).indices(tensor.shape[0]))
        return torch.stack([self._values(name, tensor, e, slice(None)) for e in experts])

    def stored(self, name: str, expert: int | None, rows: slice) -> dict[str, Tensor]:
        """The tensors of the scheme's layout for rows ``[start, stop)`` that begin and end with its blocks;
        where each row is one, for every ``step``-th of them.

        Raises:
            CheckpointError: they are not what the scheme stores.
        """
        tensor, (count, k) = self.coded[name], self.coded[name].shape[-2:]
        if rows.step:
            each = self.stored(name, expert, slice(rows.start, min(rows.stop, count)))
            return {key: value[:: rows.step].contiguous() for key, value in each.items()}
        assert tensor.scheme is not None  # `Coded.quantized` names no others
        if tensor.read is not None:
            stored = {key: value.contiguous() for key, value in tensor.read(expert, rows).items()}
        else:
            parts = stored_slices(tensor.scheme, k, rows.start, rows.stop)
            stored = {key: self.source.read(part, parts[key]) for key, part in tensor.keys.items()}
        expected = tensor.scheme.layout(rows.stop - rows.start, k)
        found = {key: (tuple(value.shape), value.dtype) for key, value in stored.items()}
        if found != expected:
            raise CheckpointError(
                f"read {name} of {self.directory} as {tensor.scheme.name}",
                _said(found),
                f"{_said(expected)}: a checkpoint of this format",
            )
        return stored

    def _values(self, name: str, tensor: CodedTensor, expert: int | None, rows: slice) -> Tensor:
        n, k = tensor.shape[-2:]
        start, stop, _ = rows.indices(n)
        if tensor.values is not None:
            return tensor.values(expert, slice(start, stop))
        if tensor.scheme is None:
            assert tensor.read is not None
            return tensor.read(expert, slice(start, stop))["weight"]
        block = alignment(tensor.scheme, 0)
        first, last = start // block * block, min(n, -(-stop // block) * block)
        stored = self.stored(name, expert, slice(first, last))
        return _dequantized(stored, tensor.scheme, last - first, k)[start - first : stop - first]

    def release(self, name: str, rows: Rows | None = None) -> None:
        """As `TensorSource.release`; of a coded tensor all that it is made of."""
        tensor = self.coded.get(name)
        if tensor is None:
            self.source.release(name, rows)
            return
        for part in tensor.tensors:
            self.source.release(part)

    def verify(self) -> None:
        """As `VerifiedSource.verify`, where the source can say."""
        if isinstance(self.source, VerifiedSource):
            self.source.verify()

    def close(self) -> None:
        """As `TensorSource.close`."""
        self.source.close()


def _dequantized(stored: Mapping[str, Tensor], scheme: Scheme, n: int, k: int) -> Tensor:
    """As `dequantize_weight`, rows by rows: what it makes on the way stays in cache."""
    step = rows_of_step(scheme, n, k, TOGETHER)
    if step >= n:
        return dequantize_weight(dict(stored), scheme, k)
    out = torch.empty(n, k, dtype=torch.float32, device="cpu")
    for start in range(0, n, step):
        rows = stored_slices(scheme, k, start, min(start + step, n))
        some = {key: tensor if rows[key] is None else tensor[rows[key]] for key, tensor in stored.items()}
        out[start : start + step] = dequantize_weight(some, scheme, k)
    return out


def _said(layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{key} {list(shape)} {dtype}" for key, (shape, dtype) in layout.items())


def _parts(layer: Layer) -> list[Part]:
    return [part for parts in layer.parts.values() for part in parts]


def _is_ordered(tensor: CodedTensor | None) -> bool:
    return tensor is not None and tensor.scheme is not None and tensor.scheme.ordered


class Coded(Recognized):
    """A checkpoint of another quantizer: each of its weights can be kept as it is, or decoded and quantized
    to another scheme.

    Args:
        format_name: Name of the format.
        source: Its tensors.
        coded: The weights that it stores as codes, by the names that they have in 16-bit checkpoints.
        unlisted: Stored tensors that are no part of the model.
        kv_cache: The KV cache that it asks for.
        notices: For people: what of the checkpoint is not used as it was meant.
        alternates: Whether rows of gate and up take turns in fused experts.

    Raises:
        CheckpointError: codes are left over.
    """

    def __init__(
        self,
        format_name: str,
        source: TensorSource,
        coded: Mapping[str, CodedTensor],
        *,
        unlisted: Iterable[str] = (),
        kv_cache: KVCacheConfig | None = None,
        notices: Iterable[str] = (),
        alternates: bool = False,
    ) -> None:
        self.decoded, self.converts = DecodedSource(source, coded, unlisted), bool(coded)
        self._alternates = alternates
        super().__init__(format_name, self.decoded)
        refuse_codes(self.decoded, f"read {source.directory} as {format_name}")
        self._kv_cache, self._notices = kv_cache or KVCacheConfig(), tuple(notices)

    def layers(self) -> list[Layer]:
        """As of a checkpoint in 16 bits."""
        return self._layers

    @cached_property
    def _layers(self) -> list[Layer]:
        layers = find_layers(self.source.tensors)
        if self._alternates:
            layers = [alternating(layer) if layer.experts else layer for layer in layers]
        return [self._with_size(layer) for layer in layers]

    def _with_size(self, layer: Layer) -> Layer:
        """A layer with the bytes of its codes, where it is stored as codes."""
        names = {part.tensor for part in _parts(layer)}
        if not names <= self.decoded.coded.keys():
            return layer
        return replace(layer, stored_bytes=sum(self.source.tensors[name].nbytes for name in names))

    def quantized(self) -> Mapping[str, Mapping[str, QuantizedWeight]]:
        """The layers all of whose weights are stored as codes that a scheme holds; of experts also each
        projection of each, which may be a module of its own.
        """
        return self._quantized

    @cached_property
    def _quantized(self) -> dict[str, dict[str, QuantizedWeight]]:
        out: dict[str, dict[str, QuantizedWeight]] = {}
        for layer in self._layers:
            parts = _parts(layer)
            if layer.kind != "other" and all(self._can_be_kept(layer, part) for part in parts):
                weights = {weight: self._weight(layer, weight, n) for weight, n, _ in layer.each}
                out[layer.name] = weights
                if layer.experts and layer.part(next(iter(weights))).expert is None:
                    single = ((layer.part(name).tensor, weight) for name, weight in weights.items())
                    out |= {name.removesuffix(".weight"): {"": weight} for name, weight in single}
        return out

    def _can_be_kept(self, layer: Layer, part: Part) -> bool:
        """Whether a scheme holds a part as it is: its first row, of a fused weight, begins a block; and no
        kernel orders the inputs of experts.
        """
        tensor = self.decoded.coded.get(part.tensor)
        if tensor is None or tensor.scheme is None or (layer.experts and _is_ordered(tensor)):
            return False
        rows = alignment(tensor.scheme, 0)
        return (part.in_place and (part.start or 0) % rows == 0) or (rows == 1 and not part.transposed)

    def _weight(self, layer: Layer, weight: str, n: int) -> QuantizedWeight:
        part = layer.part(weight)
        name, expert, first = part.tensor, part.expert, part.start or 0
        tensor = self.decoded.coded[name]
        assert tensor.scheme is not None
        end = first + n if part.in_place else part.stop
        every = range(tensor.shape[-2])[first : end : part.step]

        def read(rows: slice) -> dict[str, Tensor]:
            some = every[rows]
            step = None if part.in_place else some.step
            return self.decoded.stored(name, expert, slice(some.start, some.stop, step))

        whole = expert is None and n == tensor.shape[0]
        share = n / (tensor.shape[-2] * (tensor.shape[0] if expert is not None else 1))
        size = round(share * self.source.tensors[name].nbytes)
        keys = tensor.keys if whole else {}
        return QuantizedWeight(tensor.scheme, (name,), read, keys, size, self.decoded.source)

    def kv_cache(self) -> KVCacheConfig:
        """As the format found it."""
        return self._kv_cache

    def notices(self) -> tuple[str, ...]:
        """As the format found them, and which experts are decoded for their order."""
        coded = self.decoded.coded
        ordered = [
            layer.name
            for layer in self._layers
            if layer.experts and any(_is_ordered(coded.get(part.tensor)) for part in _parts(layer))
        ]
        if not ordered:
            return self._notices
        return *self._notices, (
            f"experts of {len(ordered)} layers ({ordered[0]}, ...) are decoded to 16 bits, or to the scheme "
            "that is asked for: they are in activation order, and no kernel orders the inputs of experts"
        )
