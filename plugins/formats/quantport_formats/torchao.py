"""TorchAO as current Transformers saves it: for a weight ``X.weight`` the tensors ``X._weight_qdata``,
``X._weight_scale`` and, of integers, ``X._weight_zero_point``; its class and blocks stand as JSON in the
metadata of the safetensors header, under ``X.weight``.

``value = (code - zero) * scale``. ``Int8Tensor`` and ``Float8Tensor`` are kept with the activations that they
ask for, ``IntxUnpackedToInt8Tensor`` with offsets ``-zero * scale``, which are exact in fp32 where scales
have 16 bits.

Source: torchao 0.18, ``prototype/safetensors/safetensors_support.py``, ``quantization/quantize_/workflows``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantport.checkpoint import CheckpointFormat, Coded, CodedTensor, Recognized, TensorSource
from quantport.checkpoint.json import parse_object
from quantport.errors import CheckpointError, shown
from quantport.numerics.packing import pack_int4
from quantport.scheme import Scheme
from quantport.scheme.catalog import Schemes
from quantport_formats.common import held_dtype, need, quant_method

_CODES = "_qdata"
_BITS = {f"int{bits}": bits for bits in range(1, 9)}
_LARGEST_GROUP = 9999


class TorchAo(CheckpointFormat):
    """``quant_method: torchao`` with weights that are quantized."""

    name = "torchao"

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """As `CheckpointFormat.recognize`."""
        stems = [name.removesuffix(_CODES) for name in source.tensors if name.endswith(_CODES)]
        if quant_method(config) != self.name or not stems:
            return None
        dtype = held_dtype(source, config)
        weights = [_weight(source, stem) for stem in stems]
        coded = {weight.name: weight.coded(schemes, dtype) for weight in weights}
        decoded = [name for name, tensor in coded.items() if tensor.scheme is None]
        notices = []
        if decoded:
            notices.append(
                f"{len(decoded)} weights ({decoded[0]}, ...) are decoded: their scales have 32 bits"
            )
        dynamic = [weight.name for weight in weights if weight.kind == _INTX and weight.dynamic]
        if dynamic:
            text = "are multiplied with activations in 16 bits, which were to be quantized with zero points"
            notices.append(f"{len(dynamic)} weights ({dynamic[0]}, ...) {text}")
        return Coded(self.name, source, coded, notices=notices)


_INTX = "IntxUnpackedToInt8Tensor"
_KINDS = {"Int8Tensor": torch.int8, "Float8Tensor": torch.float8_e4m3fn, _INTX: torch.int8}


@dataclass(frozen=True)
class _Weight:
    """One weight, as the metadata say.

    Attributes:
        source: Where it is read.
        name: Of the weight.
        stem: Of its tensors.
        kind: Class of TorchAO.
        block: Rows and columns that share a scale.
        dynamic: Whether activations are to be quantized.
        bits: Of a code.
        has_zeros: Whether zero points are stored.
    """

    source: TensorSource
    name: str
    stem: str
    kind: str
    block: tuple[int, int]
    dynamic: bool
    bits: int
    has_zeros: bool

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.source.tensors[self.stem + _CODES].shape
        return n, k

    def coded(self, schemes: Schemes, dtype: torch.dtype) -> CodedTensor:
        parts = (_CODES, "_scale", *(("_zero_point",) if self.has_zeros else ()))
        names = tuple(self.stem + part for part in parts)
        scheme = self._scheme(schemes)
        read = partial(self._stored, scheme) if scheme else self._decoded
        return CodedTensor(self.shape, dtype, scheme, names, read=read)

    def _scheme(self, schemes: Schemes) -> Scheme | None:
        rows, columns = self.block
        n, k = self.shape
        block = "tensor" if (rows, columns) == (n, k) and n > 1 else "channel"
        if columns < k:
            block = f"g{columns}"
        scale = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        stored = scale[self.source.tensors[f"{self.stem}_scale"].dtype]
        if self.kind == "Float8Tensor":
            if self.block == (128, 128):
                return schemes["fp8_per_block"]
            if self.dynamic and columns >= k:
                return schemes["fp8_per_tensor" if block == "tensor" else "fp8_per_channel"]
            return schemes[f"fp8_weight_only:{block}"]
        if self.kind == "Int8Tensor":
            return schemes[f"{'int8' if self.dynamic else 'int8_weight_only'}:{block}:{stored}"]
        if stored == "fp32" or columns > _LARGEST_GROUP:
            return None
        base = "int4_weight_only" if self.bits <= 4 else "int8_weight_only"
        return schemes[f"{base}:{block}:fp32:asym"]

    def _stored(self, scheme: Scheme, expert: int | None, rows: slice) -> Mapping[str, Tensor]:
        codes, scales, zeros = self._parts(rows)
        if self.kind != _INTX:
            if zeros is not None and zeros.any():
                raise _refusal(
                    self.source, self.name, "zero points of int8 codes that are not 0", "symmetric codes"
                )
            return {"weight": codes, "weight_scale": scales}
        assert zeros is not None  # `_weight` has seen them
        factors = scales.float()
        offsets = zeros.float().neg() * factors
        held = {"weight": codes} if self.bits > 4 else {"weight_packed": pack_int4(codes)}
        return {**held, "weight_scale": factors, "weight_zero": offsets}

    def _decoded(self, expert: int | None, rows: slice) -> Mapping[str, Tensor]:
        codes, scales, zeros = self._parts(rows)
        assert zeros is not None  # only integers with zero points are decoded
        columns, k = self.block[1], codes.shape[1]
        shifted = codes.float() - zeros.float().repeat_interleave(columns, 1)[:, :k]
        return {"weight": shifted * scales.float().repeat_interleave(columns, 1)[:, :k]}

    def _parts(self, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        down = self.block[0]
        some = slice(rows.start // down, -(-rows.stop // down))
        zeros = self.source.read(f"{self.stem}_zero_point", some) if self.has_zeros else None
        codes = self.source.read(self.stem + _CODES, rows)
        return codes, self.source.read(f"{self.stem}_scale", some), zeros


def _refusal(source: TensorSource, name: str, found: str, suggestion: str) -> CheckpointError:
    return CheckpointError(f"read {name} of {source.directory} as torchao", found, suggestion)


def _weight(source: TensorSource, stem: str) -> _Weight:
    """What the metadata say of a weight.

    Raises:
        CheckpointError: they say nothing, name another class, or do not fit the tensors.
    """
    module, _, parameter = stem.rpartition("._")
    name = f"{module}.{parameter}"
    metadata = getattr(source, "metadata", {})
    if name not in metadata:
        raise _refusal(
            source, name, "no metadata of it in the header", "the files as Transformers saved them"
        )
    asked = f"read the metadata of {name} of {source.directory} as torchao"
    said = parse_object(metadata[name].encode(), asked, "metadata", "the files as Transformers saved them")
    kind, data = said.get("_type"), said.get("_data")
    if not isinstance(kind, str) or kind not in _KINDS or not isinstance(data, Mapping):
        known = ", ".join(_KINDS)
        raise _refusal(source, name, f"a {shown(kind)}", f"{known}: quantize the 16-bit original to a scheme")
    info = source.tensors[stem + _CODES]
    if len(info.shape) != 2 or info.dtype is not _KINDS[kind] or not all(info.shape):
        found = f"codes of shape {list(info.shape)}, {info.dtype}"
        raise _refusal(source, name, found, f"a matrix of {_KINDS[kind]}")
    n, k = info.shape
    block = _block(data.get("block_size"), n, k, kind)
    if block is None:
        raise _refusal(
            source, name, f"block_size {shown(data.get('block_size'))} of [{n}, {k}]", "whole blocks"
        )
    scales = need(source, "torchao", f"{stem}_scale", (n // block[0], k // block[1]))
    floats = (torch.float32,) if kind == "Float8Tensor" else (torch.float32, torch.bfloat16, torch.float16)
    if scales.dtype not in floats:
        raise _refusal(source, name, f"scales of {scales.dtype}", f"scales of {floats[0]}")
    has_zeros = f"{stem}_zero_point" in source.tensors
    if has_zeros or kind == _INTX:
        zeros = need(source, "torchao", f"{stem}_zero_point", (n // block[0], k // block[1]))
        if zeros.dtype is not torch.int8:
            raise _refusal(source, name, f"zero points of {zeros.dtype}", "zero points of int8")
    target = data.get("target_dtype")
    named = target.get("_data") if isinstance(target, Mapping) else None
    bits = 8 if kind != _INTX else _BITS.get(named, 0) if isinstance(named, str) else 0
    if not bits:
        raise _refusal(source, name, f"target_dtype {shown(target)}", ", ".join(_BITS))
    dynamic = bool(data.get("act_quant_kwargs") or data.get("activation_quantization"))
    return _Weight(source, name, stem, kind, block, dynamic, bits, has_zeros)


def _block(said: Any, n: int, k: int, kind: str) -> tuple[int, int] | None:
    """Rows and columns of a block; None where they do not cover a weight, or no scheme has such."""
    if not (
        isinstance(said, list) and len(said) == 2 and all(type(size) is int and size > 0 for size in said)
    ):
        return None
    rows, columns = said
    if n % rows or k % columns:
        return None
    whole = (rows, columns) == (n, k) and kind != _INTX
    square = (rows, columns) == (128, 128) and kind == "Float8Tensor"
    grouped = rows == 1 and (columns == k or columns <= _LARGEST_GROUP)
    return (rows, columns) if whole or square or grouped else None
