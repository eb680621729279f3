"""Bytes of the KV cache for each token: pure, from what ``config.json`` says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantport.errors import ConfigError
from quantport.kvcache.rows import AUTO, cache_dtype

FULL, WINDOW, NONE = "full", "window", "none"
_KINDS = {
    "full_attention": FULL,
    "sliding_attention": WINDOW,
    "chunked_attention": WINDOW,
    "linear_attention": NONE,
    "conv": NONE,
}


@dataclass(frozen=True)
class KVShape:
    """What a model keeps for each token.

    Attributes:
        layers: For each layer ``full``, ``window`` (the last tokens only, always in 16 bits) or ``none``.
        heads: KV heads.
        head_dim: Elements of one head.
    """

    layers: tuple[str, ...]
    heads: int
    head_dim: int


def skipped(skip_layers: Iterable[int], layers: int) -> frozenset[int]:
    """Resolves negative indices.

    Raises:
        ConfigError: an index is no layer.
    """
    if not isinstance(skip_layers, Iterable):
        raise ConfigError(
            f"kv_cache_skip_layers {skip_layers!r}", "not a list of layers", "for example [0, -1]"
        )
    indices = tuple(skip_layers)
    wrong = [i for i in indices if not isinstance(i, int) or not -layers <= i < layers]
    if wrong:
        suggestion = f"-{layers} to {layers - 1}; negative ones count from the last layer"
        raise ConfigError(
            f"kv_cache_skip_layers {list(indices)}",
            f"{wrong[0]!r} is none of the {layers} layers",
            suggestion,
        )
    return frozenset(i % layers for i in indices)


def bytes_per_token(shape: KVShape, dtype: str | None = None, skip_layers: Iterable[int] = ()) -> int:
    """Bytes that one more token takes, keys and values of all layers and heads, scales included.

    Args:
        shape: What the model keeps.
        dtype: As ``kv_cache_dtype``; None is 16 bits.
        skip_layers: Layers that stay in 16 bits.

    Raises:
        ConfigError: unknown dtype, or no such layer.
    """
    wide, asked, skip = AUTO, cache_dtype(dtype), skipped(skip_layers, len(shape.layers))
    rows = [
        wide if kind == WINDOW or i in skip else asked for i, kind in enumerate(shape.layers) if kind != NONE
    ]
    return 2 * shape.heads * sum(row.row_bytes(shape.head_dim) for row in rows)


def kv_summary(shape: KVShape | None, dtype: str | None, skip_layers: Iterable[int]) -> dict[str, Any]:
    """Plain data: the dtype, the layers it skips, and bytes per token beside those of BF16 (None without a
    shape).
    """
    skip = list(skip_layers)
    sizes = (bytes_per_token(shape, dtype, skip), bytes_per_token(shape)) if shape else (None, None)
    out = {"dtype": cache_dtype(dtype).name, "skip_layers": skip}
    return out | {"bytes_per_token": sizes[0], "bytes_per_token_bf16": sizes[1]}


def kv_shape(config: Mapping[str, Any]) -> KVShape | None:
    """Reads a Transformers configuration; None where it does not say enough to count, instead of a guess.

    That is so for latent attention (what is kept differs between implementations), and for windows without
    ``layer_types``.
    """
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) else config
    queries: Any = config.get("num_attention_heads")
    hidden: Any = config.get("hidden_size")
    heads: Any = config.get("num_key_value_heads") or queries
    dim: Any = config.get("head_dim") or (hidden // queries if _positive(hidden, queries) else None)
    layers = _layers(config)
    if (
        layers is None
        or not _positive(heads, dim)
        or len(layers) != config.get("num_hidden_layers")
        or config.get("kv_lora_rank")
    ):
        return None
    return KVShape(layers, heads, dim)


def _positive(*values: Any) -> bool:
    return all(isinstance(v, int) and v > 0 for v in values)


def _layers(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    types = config.get("layer_types")
    if isinstance(types, list):
        kinds = [_KINDS.get(str(t)) for t in types]
        return None if None in kinds else tuple(k for k in kinds if k)
    windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
    count: Any = config.get("num_hidden_layers")
    return (FULL,) * count if _positive(count) and not windowed else None
