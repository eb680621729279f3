"""The record of a checkpoint that quantport wrote: which layer has which scheme (``quantport.json``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantport.checkpoint import Checkpoint
from quantport.config import QuantConfig
from quantport.errors import CheckpointError
from quantport.host import host
from quantport.layers import EMBEDDING, Layer, Part, find_layers
from quantport.loading.build import read_json

FILE = "quantport.json"
_RUNTIME = {"kv_cache_dtype", "kv_cache_skip_layers"}  # what may change from run to run: it is not in the weights


class SavedLayer(BaseModel):
    """One quantized layer as saved."""

    model_config = ConfigDict(extra="forbid")
    scheme: str
    kind: Literal["linear", "moe", "embedding"]
    weights: list[tuple[str, int, int]] = Field(min_length=1, max_length=3)
    experts: int = Field(0, ge=0)
    tied: list[str] = []
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


class Record(BaseModel):
    """The file: format version, the quantized layers by module path, and the KV cache that ``generate`` makes."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    layers: dict[str, SavedLayer]
    kv_cache_dtype: str | None = None
    kv_cache_skip_layers: tuple[int, ...] = ()


def read(directory: Path) -> Record | None:
    """Reads the record of a checkpoint; None when quantport did not write it.

    Raises:
        CheckpointError: the record is malformed.
    """
    data: dict[str, Any] = read_json(directory / FILE)
    if not data:
        return None
    try:
        return Record.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise CheckpointError(f"read {directory / FILE}", found, "the file that quantport wrote, in format 1") from None


def layers(record: Record, checkpoint: Checkpoint) -> list[Layer]:
    """The layers of a saved checkpoint: the quantized ones from the record, the rest from the headers.

    Raises:
        CheckpointError: a recorded tensor is absent or has another shape or dtype.
    """
    out: list[Layer] = []
    taken: set[str] = set()
    for name, entry in record.layers.items():
        parts: dict[str, tuple[Part, ...]] = {}
        for weight, n, k in entry.weights:
            fused = not entry.experts and len(entry.weights) > 1
            layout = host().schemes[entry.scheme].layout(n, k)
            bases = [f"{name}.{e}.{weight}" for e in range(entry.experts)] or [f"{name}.{weight}" if fused else name]
            for full, expected in ((f"{b}.{key}", want) for b in bases for key, want in layout.items()):
                info = checkpoint.tensors.get(full)
                if info is None or (tuple(info.shape), info.dtype) != expected:
                    found = f"{list(info.shape)} {info.dtype}" if info else "no such tensor"
                    raise CheckpointError(f"load {full} of {checkpoint.directory}", found, f"{list(expected[0])} {expected[1]}")
                taken.add(full)
            parts[weight] = tuple(Part(f"{b}.{key}") for b in bases for key in layout)
        dtype = getattr(torch, entry.dtype)
        kind, keep = ("linear", EMBEDDING) if entry.kind == "embedding" else (entry.kind, "")
        out.append(Layer(name, kind, tuple(entry.weights), dtype, entry.experts, parts, keep, tied=tuple(entry.tied)))
    return out + find_layers({n: t for n, t in checkpoint.tensors.items() if n not in taken})


def asks_weights(config: Any) -> bool:
    """Whether a configuration says something of the weights, which are quantized already."""
    given = config if isinstance(config, Mapping) else config.model_fields_set if isinstance(config, QuantConfig) else [config]
    return config is not None and not set(given) <= _RUNTIME


def config(record: Record, fallback: str, asked: QuantConfig) -> QuantConfig:
    """The configuration that asks for exactly what was saved: every recorded layer by name, everything else kept.

    The KV cache is what was saved too, unless ``asked`` says another.
    """
    targets = {n: entry.scheme for name, entry in record.layers.items() for n in (name, *entry.tied)}
    source: Any = asked if asked.model_fields_set & _RUNTIME else record
    cache = {key: getattr(source, key) for key in _RUNTIME}
    weights = {"targets": targets, "linear": None, "moe": None, "scheme": None, "fallback": fallback}
    return QuantConfig.parse({**weights, **cache}, host().schemes)
