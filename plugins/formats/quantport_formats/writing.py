"""What the formats that are written share."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quantport.checkpoint import SavedLayer, SavedModel
from quantport.errors import SaveError
from quantport.scheme import Scheme


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
        SaveError: an embedding, or a fused layer that is quantized in parts.
    """
    for path, layer in layers.items():
        lookup = layer.kind == "embedding" and not embeddings
        if lookup or (len(layer.weights) > 1 and not layer.experts):
            kind = "a quantized embedding" if lookup else "a fused layer in parts"
            raise SaveError(asked, f"{path}, {kind}", "format='quantport', which holds it")
        shapes = {name: (n, k) for name, n, k in layer.weights}
        for weight, scheme in layer.schemes.items():
            n, k = shapes[weight.rpartition(".")[2] if layer.experts else "weight"]
            stem = f"{path}.{weight}" if layer.experts else path
            yield Written(path, stem, scheme, n, k)


def config_json(
    asked: str,
    model: SavedModel,
    quantization: Mapping[str, Any] | None = None,
    lost: Sequence[str] = (),
) -> dict[str, bytes | Path]:
    """``config.json``, with a ``quantization_config`` if there is one, as ``files`` of ``save_tensors``. What
    the formats of others have no place for is said.

    Raises:
        SaveError: the model has no configuration.
    """
    if model.config is None:
        raise SaveError(asked, "a model without config.json", "format='quantport'")
    lost = list(lost)
    if model.kv_cache.dtype not in (None, "auto"):
        lost.append(f"the KV cache in {model.kv_cache.dtype}")
    if model.fallback not in (None, "weight_only"):
        lost.append(f"fallback={model.fallback!r}")
    if lost:
        text = f"{asked}: {' and '.join(lost)} is not written: say it again when it is loaded"
        warnings.warn(text, UserWarning, stacklevel=5)
    described = {**model.config, **({"quantization_config": quantization} if quantization else {})}
    return {"config.json": json.dumps(described, indent=2, sort_keys=True, default=str).encode()}
