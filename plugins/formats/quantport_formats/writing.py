"""What the formats that are written share."""

from __future__ import annotations

import json
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantport.checkpoint import (
    CheckpointFormat,
    Fill,
    Joined,
    Rewrite,
    SavedLayer,
    SavedModel,
    SaveTarget,
    Stream,
    TensorLayout,
    rewritten,
)
from quantport.errors import SaveError
from quantport.scheme import Scheme
from quantport.scheme.catalog import BUILTIN

OWN = "format='quantport', which holds it"


@dataclass(frozen=True)
class Writing:
    """How a model is written.

    Attributes:
        quantization: ``quantization_config``.
        changes: As for `rewritten`.
        further: As for `rewritten`.
        joined: As for `rewritten`.
        files: Further files of JSON.
    """

    quantization: Mapping[str, Any]
    changes: Mapping[str, Rewrite] = field(default_factory=dict)
    further: Mapping[str, Tensor] = field(default_factory=dict)
    joined: Iterable[Joined] = ()
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class WrittenFormat(CheckpointFormat):
    """A format of others that is written."""

    @abstractmethod
    def writing(self, asked: str, model: SavedModel) -> Writing:
        """How a model is written.

        Args:
            asked: For errors.
            model: The model.

        Raises:
            SaveError: a scheme or a layer that the format cannot hold.
        """

    def write(
        self, model: SavedModel, tensors: Stream | Fill, layout: TensorLayout | None, to: SaveTarget
    ) -> Path:
        """As `CheckpointFormat.write`. What the format has no place for is said.

        Raises:
            SaveError: a scheme or a layer that the format cannot hold, or a model without a configuration; as
                `save_tensors`.
        """
        asked = f"save a checkpoint to {to.directory} as {self.name}"
        writing = self.writing(asked, model)
        files = config_json(asked, model, writing.quantization)
        files |= {name: _json(content) for name, content in writing.files.items()}
        tensors, layout = rewritten(tensors, layout, writing.changes, writing.further, writing.joined)
        return to.save(tensors, layout, files)

    def refusal(self, model: SavedModel) -> str | None:
        """As `CheckpointFormat.refusal`."""
        if "model_type" not in (model.config or {}):
            return "it is no model of Transformers"
        try:
            self.writing("", model)
        except SaveError as error:
            return error.found
        return " and ".join(_lost(model)) or None


def config_json(
    asked: str, model: SavedModel, quantization: Mapping[str, Any] | None = None, lost: Iterable[str] = ()
) -> dict[str, bytes | Path]:
    """``config.json``, with a ``quantization_config`` if there is one, as ``files`` of ``save_tensors``. What
    the formats of others have no place for is said.

    Raises:
        SaveError: the model has no configuration.
    """
    if model.config is None:
        raise SaveError(asked, "a model without config.json", "format='quantport'")
    if lost := [*lost, *_lost(model)]:
        text = f"{asked}: {' and '.join(lost)} is not written: say it again when it is loaded"
        warnings.warn(text, UserWarning, stacklevel=5)
    described = {**model.config, **({"quantization_config": quantization} if quantization else {})}
    return {"config.json": _json(described)}


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True, default=str).encode()


def _lost(model: SavedModel) -> list[str]:
    """What no format of others has a place for."""
    lost = [f"the KV cache in {model.kv_cache.dtype}"] if model.kv_cache.dtype not in (None, "auto") else []
    if model.fallback not in (None, "weight_only"):
        lost.append(f"fallback={model.fallback!r}")
    return lost


class Written(NamedTuple):
    """A quantized weight on its way into a checkpoint.

    Attributes:
        layer: Path of its module.
        stem: What the names of its stored tensors begin with, which a key of ``Scheme.layout`` follows.
        scheme: Its scheme.
        n: Rows.
        k: Columns.
    """

    layer: str
    stem: str
    scheme: Scheme
    n: int
    k: int


def written_weights(
    asked: str, layers: Mapping[str, SavedLayer], *, embeddings: bool = False
) -> Iterator[Written]:
    """Every quantized weight of a model whose layers are stored one by one.

    Args:
        asked: What was asked, for errors.
        layers: The layers.
        embeddings: Whether the format has quantized embeddings.

    Raises:
        SaveError: an embedding, a fused layer that is quantized in parts, a weight in activation order, or
            experts that checkpoints of their architecture do not hold one by one.
    """
    for path, layer in layers.items():
        if not layer.apart:
            found = (
                f"{path}, whose experts no checkpoint of this architecture holds one by one as they are here"
            )
            raise SaveError(asked, found, OWN)
        lookup = layer.kind == "embedding" and not embeddings
        if lookup or (len(layer.weights) > 1 and not layer.experts):
            kind = "a quantized embedding" if lookup else "a fused layer in parts"
            raise SaveError(asked, f"{path}, {kind}", OWN)
        shapes = {name: (n, k) for name, n, k in layer.weights}
        for weight, scheme in layer.schemes.items():
            n, k = shapes[weight.rpartition(".")[2] if layer.experts else "weight"]
            if scheme.ordered:
                raise SaveError(asked, f"{path} in activation order", OWN)
            stem = f"{path}.{weight}" if layer.experts else path
            yield Written(path, stem, scheme, n, k)


def as_scalar(given: str, name: str = "") -> Rewrite:
    """How the one element of a tensor is written: without dimensions, under its name or another one."""
    return Rewrite(name or given, lambda one: one.reshape(()), ((), torch.float32))


def one_of(scheme: Scheme, names: Iterable[str]) -> str | None:
    """The name of a scheme that stores the same numbers and multiplies them alike, by whatever rule its
    scales were found; None where none of these does.
    """

    def meaning(of: Scheme) -> tuple[object, ...]:
        return replace(of.weight, rule="amax"), of.activation, of.rotation

    return next((name for name in names if meaning(BUILTIN[name]) == meaning(scheme)), None)
