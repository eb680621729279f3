"""bitsandbytes: NF4 and FP4 of QLoRA, with scales that may be quantized themselves, and LLM.int8().

4 bits: ``weight`` uint8 ``[n * k / 2, 1]``, the first code of a byte in its high bits; blocks of the flat
weight, whose scales are ``weight.absmax`` fp32, or uint8 with ``nested_absmax`` for 256 of them: ``scale =
nested_quant_map[code] * nested_absmax + nested_offset``. The shape and the size of blocks stand only in
``weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``), JSON as bytes, which is therefore read at once.

8 bits: ``weight`` int8 ``[n, k]`` and ``SCB`` fp32 ``[n]``, the largest magnitude of each row. bitsandbytes
rounds twice, ``code * SCB * (1 / 127)``; here the scale is ``SCB / 127``, rounded once, so that values differ
by at most a unit in the last place of fp32.

Source: bitsandbytes 0.50.2, ``functional.py`` (``QuantState``), ``backends/default/ops.py``, ``_ops.py``
(``int8_vectorwise_dequant``), ``nn/modules.py`` (``weight_format``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantport.checkpoint import CheckpointFormat, Coded, CodedTensor, Recognized, TensorSource
from quantport.checkpoint.json import parse_object
from quantport.errors import CheckpointError, shown
from quantport.numerics.codebooks import codebook, lookup
from quantport.scheme.catalog import Schemes
from quantport_formats.common import held_dtype, need, quant_method

_STATE = ".quant_state.bitsandbytes__"
_NESTED_BLOCK = 256
_LARGEST_STATE = 1 << 16  # bytes


class Bitsandbytes(CheckpointFormat):
    """``quant_method: bitsandbytes`` with weights that it stored, in 4 or 8 bits."""

    name = "bitsandbytes"

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """As `CheckpointFormat.recognize`; the states of weights in 4 bits, which are JSON, are read."""
        states = [name for name in source.tensors if _STATE in name]
        rows = [name for name in source.tensors if name.endswith(".SCB")]
        if quant_method(config) != self.name or not (states or rows):
            return None
        dtype = held_dtype(source, config)
        four = [_FourBits(source, state) for state in states]
        coded = {layer.name: layer.coded(schemes, dtype) for layer in four}
        if len(coded) != len(states):
            raise CheckpointError(
                f"read {source.directory} as bitsandbytes", "a weight with two states", "one state for each"
            )
        coded |= dict(_eight_bits(source, scb, dtype, schemes) for scb in rows)
        return Coded(self.name, source, coded, notices=_notices(four, coded, len(rows)))


def _notices(four: list[_FourBits], coded: Mapping[str, CodedTensor], eight: int) -> list[str]:
    nested = sum(layer.nested for layer in four)
    decoded = [name for name, tensor in coded.items() if tensor.scheme is None]
    out = []
    if nested:
        out.append(f"scales of {nested} weights, stored in 8 bits, are held in fp32, to the same values")
    if decoded:
        out.append(
            f"{len(decoded)} weights ({decoded[0]}, ...) are decoded: blocks of one scale reach over rows"
        )
    if eight:
        out.append(
            f"{eight} weights of LLM.int8() are multiplied with activations in 16 bits; bitsandbytes "
            "quantizes all but the outliers among these"
        )
    return out


def _refusal(source: TensorSource, name: str, found: str, suggestion: str) -> CheckpointError:
    return CheckpointError(f"read {name} of {source.directory} as bitsandbytes", found, suggestion)


class _FourBits:
    """One weight in NF4 or FP4, as its state says."""

    def __init__(self, source: TensorSource, state: str) -> None:
        self.source, (self.name, _, self.format) = source, state.partition(_STATE)
        if self.format not in ("nf4", "fp4"):
            raise _refusal(source, state, f"codes {shown(self.format)}", "nf4 or fp4")
        said = self._said(state)
        shape, size = said.get("shape"), said.get("blocksize")
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(d) is int and d > 0 for d in shape)):
            raise _refusal(source, state, f"shape {shown(shape)}", "the shape of a matrix")
        if type(size) is not int or size < 1 or said.get("quant_type") != self.format:
            found = f"blocksize {shown(size)}, quant_type {shown(said.get('quant_type'))}"
            raise _refusal(source, state, found, f"a positive blocksize, and quant_type {self.format}")
        self.n, self.k = shape
        self.size = size
        blocks = -(-self.n * self.k // size)
        info = need(source, "bitsandbytes", self.name, (-(-self.n * self.k // 2), 1))
        if info.dtype is not torch.uint8:
            raise _refusal(source, self.name, f"dtype {info.dtype}", "bytes: bnb_4bit_quant_storage uint8")
        absmax = need(source, "bitsandbytes", f"{self.name}.absmax", (blocks,))
        need(source, "bitsandbytes", f"{self.name}.quant_map", (16,))
        self.nested = absmax.dtype is torch.uint8
        self.tensors = [self.name, *(f"{self.name}.{part}" for part in ("absmax", "quant_map")), state]
        if self.nested:
            self._check_nested(state, said, blocks)
        elif absmax.dtype is not torch.float32:
            raise _refusal(source, f"{self.name}.absmax", f"dtype {absmax.dtype}", "fp32, or bytes")

    def _said(self, state: str) -> Mapping[str, Any]:
        info = self.source.tensors[state]
        if info.dtype is not torch.uint8 or len(info.shape) != 1 or info.nbytes > _LARGEST_STATE:
            raise _refusal(self.source, state, f"shape {list(info.shape)}, {info.dtype}", "JSON as bytes")
        raw = self.source.read(state).numpy().tobytes()
        asked = f"read {state} of {self.source.directory} as bitsandbytes"
        return parse_object(raw, asked, "a state", "the state that bitsandbytes wrote")

    def _check_nested(self, state: str, said: Mapping[str, Any], blocks: int) -> None:
        offset, size = said.get("nested_offset"), said.get("nested_blocksize")
        if isinstance(offset, bool) or not isinstance(offset, int | float) or size != _NESTED_BLOCK:
            found = f"nested_offset {shown(offset)}, nested_blocksize {shown(size)}"
            raise _refusal(self.source, state, found, f"a number, and {_NESTED_BLOCK}")
        try:
            self.offset = float(offset)
        except OverflowError as error:
            raise _refusal(self.source, state, "a nested_offset beyond fp32", "a number") from error
        counts = {"nested_absmax": -(-blocks // _NESTED_BLOCK), "nested_quant_map": 256}
        for part, count in counts.items():
            need(self.source, "bitsandbytes", f"{self.name}.{part}", (count,))
            self.tensors.append(f"{self.name}.{part}")

    def coded(self, schemes: Schemes, dtype: torch.dtype) -> CodedTensor:
        scheme = None
        if self.k % self.size == 0 and self.k % 2 == 0 and self.size < 10_000:
            scheme = schemes[self.format if self.size == 64 else f"{self.format}:g{self.size}"]
        read = self._stored if scheme else self._decoded
        return CodedTensor((self.n, self.k), dtype, scheme, tuple(self.tensors), read=read)

    def _stored(self, expert: int | None, rows: slice) -> Mapping[str, Tensor]:
        self._check_map()
        packed = self.source.read(self.name, slice(rows.start * self.k // 2, rows.stop * self.k // 2))
        swapped = (packed >> 4 | packed << 4).view(-1, self.k // 2)
        groups = self.k // self.size
        scales = self._scales(rows.start * groups, rows.stop * groups)
        return {"weight_packed": swapped, "weight_scale": scales.view(-1, groups)}

    def _decoded(self, expert: int | None, rows: slice) -> Mapping[str, Tensor]:
        table = self._check_map()
        start, stop = rows.start * self.k, rows.stop * self.k
        packed = self.source.read(self.name, slice(start // 2, -(-stop // 2))).flatten()
        codes = torch.stack((packed >> 4, packed & 15), -1).flatten()[start % 2 :][: stop - start]
        first = start // self.size
        scales = self._scales(first, -(-stop // self.size))
        of = torch.arange(start, stop, device="cpu", dtype=torch.int64) // self.size - first
        return {"weight": (lookup(table, codes) * scales[of]).view(-1, self.k)}

    def _check_map(self) -> Tensor:
        """The table of values, which is the one that schemes have."""
        table, found = codebook(self.format, torch.device("cpu")), self.source.read(f"{self.name}.quant_map")
        if not torch.equal(found.float(), table):
            raise _refusal(
                self.source, f"{self.name}.quant_map", f"other values than {self.format} has", "its own"
            )
        return table

    def _scales(self, start: int, stop: int) -> Tensor:
        """Scales of some blocks, in fp32."""
        absmax = self.source.read(f"{self.name}.absmax", slice(start, stop))
        if not self.nested:
            return absmax
        table = self.source.read(f"{self.name}.nested_quant_map").float()
        of = torch.arange(start, stop, device="cpu", dtype=torch.int64) // _NESTED_BLOCK
        factors = self.source.read(f"{self.name}.nested_absmax").float()[of]
        return lookup(table, absmax) * factors + self.offset


def _eight_bits(
    source: TensorSource, scb: str, dtype: torch.dtype, schemes: Schemes
) -> tuple[str, CodedTensor]:
    """A weight of LLM.int8() with its name."""
    stem = scb.removesuffix(".SCB")
    name, order = f"{stem}.weight", f"{stem}.weight_format"
    info = need(source, "bitsandbytes", name)
    if len(info.shape) != 2 or info.dtype is not torch.int8:
        found = f"shape {list(info.shape)}, dtype {info.dtype}"
        raise _refusal(source, name, found, "a matrix of int8")
    if need(source, "bitsandbytes", scb, (info.shape[0],)).dtype is not torch.float32:
        raise _refusal(source, scb, f"dtype {source.tensors[scb].dtype}", "fp32")
    scheme = schemes["int8_weight_only"]
    names = (name, scb, *((order,) if order in source.tensors else ()))
    read = partial(_read_rows, source, names)
    return name, CodedTensor(tuple(info.shape), dtype, scheme, names, read=read)


def _read_rows(
    source: TensorSource, names: tuple[str, ...], expert: int | None, rows: slice
) -> Mapping[str, Tensor]:
    if len(names) > 2 and source.read(names[2]).any():
        raise _refusal(
            source, names[2], "codes in the order of one GPU", "row order: save it again with bitsandbytes"
        )
    scale = source.read(names[1], rows) / 127
    return {"weight": source.read(names[0], rows), "weight_scale": scale.view(-1, 1)}
