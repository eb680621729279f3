"""Tensors that no model of a configuration has a place for, as far as names say: for planning without one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from quantport.model.layers import Layer
from quantport.model.roles import SkipCode, SkipReason

_BLOCK = re.compile(r"(?:model\.|language_model\.|transformer\.)*(?:layers|h)\.(\d+)\.")
# what vLLM and others store of a quantized KV cache; quantport's caches make their own
_CACHE_SCALES = {"k_scale", "v_scale", "kv_scale"}


def beyond_config(layers: Iterable[Layer], config: Mapping[str, Any]) -> list[Layer]:
    """Marks decoder layers from ``num_hidden_layers`` on, such as those that predict further tokens, and
    scales of a KV cache.
    """
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    count = text.get("num_hidden_layers") or text.get("n_layer")
    return [_marked(layer, count) for layer in layers]


def _marked(layer: Layer, count: Any) -> Layer:
    block = _BLOCK.match(f"{layer.name}.")
    if block and type(count) is int and int(block[1]) >= count:
        why = f"it is in layer {block[1]}, and the configuration has {count} layers"
    elif layer.kind == "other" and layer.name.rpartition(".")[2] in _CACHE_SCALES:
        why = "a scale of a KV cache that is not quantport's"
    else:
        return layer
    return replace(layer, skip_reason=SkipReason(SkipCode.BEYOND_CONFIG, why))
