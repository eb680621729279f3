"""quantport's own format: safetensors in the stored layout of each scheme, and ``quantport.json``, which says
which layer has which scheme.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantport.checkpoint.format import (
    CheckpointFormat,
    KVCacheConfig,
    QuantizedWeight,
    Recognized,
    SavedModel,
    SaveTarget,
)
from quantport.checkpoint.rewritten import Rewrite, rewritten
from quantport.checkpoint.shard import Fill, Stream, TensorLayout
from quantport.checkpoint.source import TensorSource
from quantport.errors import CheckpointError
from quantport.model.layers import Layer, Part, find_layers
from quantport.model.roles import Role, skipped_by_default
from quantport.numerics.by_rows import stored_slices
from quantport.scheme import Scheme
from quantport.scheme.catalog import Schemes
from quantport.scheme.formats import BF16

if TYPE_CHECKING:  # pydantic takes as long to import as all the rest of quantport
    from quantport.checkpoint.record import Entry, Record

FILE = "quantport.json"
# Without quant_method Transformers and Diffusers refuse a configuration; one that they do not know they log.
MARK = {"quantized_by": "quantport"}
_ROLES = {"linear": Role.LINEAR, "moe": Role.EXPERTS, "embedding": Role.EMBEDDING}


def is_quantport(directory: Path) -> bool:
    """Whether quantport wrote the checkpoint."""
    return (directory / FILE).exists()


class QuantportFormat(CheckpointFormat):
    """What ``quantport.save`` writes, and ``quantport.load`` reads back bit for bit."""

    name = "quantport"

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """As `CheckpointFormat.recognize`."""
        if not is_quantport(source.directory):
            return None
        from quantport.checkpoint.record import read_record

        return _Quantized(self.name, source, read_record(source.directory / FILE), schemes)

    def write(
        self, model: SavedModel, tensors: Stream | Fill, layout: TensorLayout | None, to: SaveTarget
    ) -> Path:
        """As `CheckpointFormat.write`."""
        from quantport.checkpoint.record import Record, entry_of

        record = Record(
            layers={name: entry_of(layer) for name, layer in model.layers.items()},
            kv_cache_dtype=model.kv_cache.dtype,
            kv_cache_skip_layers=model.kv_cache.skip_layers,
            fallback=model.fallback,
        )
        own = {FILE: record.model_dump_json(indent=1).encode()}
        if model.config is not None:
            marked = {**model.config, "quantization_config": MARK}
            own["config.json"] = json.dumps(marked, indent=2, sort_keys=True, default=str).encode()
        codes = [
            ".".join(filter(None, (name, weight, "weight")))
            for name, layer in model.layers.items()
            for weight, scheme in layer.schemes.items()
            if scheme.name != "bf16"
        ]
        tensors, layout = rewritten(tensors, layout, {n: Rewrite(f"{n}_codes") for n in codes}, {})
        return to.save(tensors, layout, own)


class _Quantized(Recognized):
    def __init__(self, format_name: str, source: TensorSource, record: Record, schemes: Schemes) -> None:
        super().__init__(format_name, source)
        self.record, self.schemes = record, schemes

    def layers(self) -> list[Layer]:
        """The quantized layers from the record, the rest from the headers."""
        out: list[Layer] = []
        stored: set[str] = set()
        for name, weights in self._weights.items():
            entry = self.record.layers[name]
            parts: dict[str, list[Part]] = {}
            for weight, projection, _, _ in entry.each():
                parts.setdefault(projection, []).extend(map(Part, weights[weight].tensors))
            stored |= {tensor for weight in weights.values() for tensor in weight.tensors}
            role = _ROLES[entry.kind]
            layer = Layer(
                name,
                kind="linear" if role is Role.EMBEDDING else entry.kind,
                weights=tuple(entry.weights),
                dtype=getattr(torch, entry.dtype),
                experts=entry.experts,
                parts={projection: tuple(tensors) for projection, tensors in parts.items()},
                role=role,
                skip_reason=skipped_by_default(role),
                tied=tuple(entry.tied),
            )
            out.append(layer)
        return out + find_layers({n: t for n, t in self.source.tensors.items() if n not in stored})

    def quantized(self) -> Mapping[str, Mapping[str, QuantizedWeight]]:
        """As recorded; each stored tensor must be there as its scheme says."""
        return self._weights

    @cached_property
    def _weights(self) -> dict[str, dict[str, QuantizedWeight]]:
        return {
            name: {weight: self._weight(name, entry, weight, n, k) for weight, _, n, k in entry.each()}
            for name, entry in self.record.layers.items()
        }

    def kv_cache(self) -> KVCacheConfig:
        return KVCacheConfig(self.record.kv_cache_dtype, self.record.kv_cache_skip_layers)

    def fallback(self) -> str | None:
        return self.record.fallback

    def _weight(self, name: str, entry: Entry, weight: str, n: int, k: int) -> QuantizedWeight:
        scheme = self.schemes[entry.others.get(weight, entry.scheme)]
        keys = {}
        for key, expected in scheme.layout(n, k).items():
            codes = key == "weight" and scheme.weight.element is not BF16 and self.record.format > 1
            full = keys[key] = ".".join(filter(None, (name, weight, f"{key}_codes" if codes else key)))
            info = self.source.tensors.get(full)
            if info is None or (tuple(info.shape), info.dtype) != expected:
                found = f"{list(info.shape)} {info.dtype}" if info else "no such tensor"
                raise CheckpointError(
                    f"load {full} of {self.source.directory}", found, f"{list(expected[0])} {expected[1]}"
                )
        return QuantizedWeight(scheme, tuple(keys.values()), partial(self._read, scheme, k, keys), keys)

    def _read(self, scheme: Scheme, k: int, keys: Mapping[str, str], rows: slice) -> dict[str, Tensor]:
        some = stored_slices(scheme, k, rows.start, rows.stop)
        return {key: self.source.read(name, some[key]) for key, name in keys.items()}
