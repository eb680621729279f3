"""Fused layers: several projections stored as one weight, whose scales must not span them.

``q``, ``k`` and ``v`` differ in magnitude, so that one scale for the three costs the small ones most of their
bits (https://github.com/vllm-project/vllm/issues/41022). Each part is quantized as if it were stored alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

from quantport.model.layers import FUSED, Layer, Part
from quantport.numerics.sharding import alignment, spans_shards
from quantport.scheme import Scheme


def with_cuts(layer: Layer, config: Mapping[str, Any]) -> Layer:
    """Notes where the projections of a fused linear layer end; ``config`` is the ``config.json`` of the
    model.

    ``gate_up_proj`` is half and half. The parts of ``qkv_proj`` follow from the numbers of heads, in the
    configuration or in one of its parts (``text_config``), where they add up to the rows of the layer.
    """
    last = layer.name.rpartition(".")[2]
    if layer.kind != "linear" or last not in FUSED or len(layer.weights) > 1:
        return layer
    n = layer.weights[0][1]
    if last == "gate_up_proj":
        sizes: list[tuple[int, ...]] = [(n // 2, n // 2)]
    else:
        sizes = [s for c in (config, *config.values()) if isinstance(c, Mapping) and (s := _heads(c))]
    fitting = next((s for s in sizes if sum(s) == n and all(s)), ())
    return replace(layer, cuts=tuple(zip(FUSED[last], fitting, strict=True)) if fitting else ())


def _heads(config: Mapping[str, Any]) -> tuple[int, ...]:
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    size = config.get("head_dim") or (
        hidden // heads if isinstance(heads, int) and heads and isinstance(hidden, int) else None
    )
    groups = config.get("num_key_value_heads") or heads
    if not all(isinstance(x, int) and x > 0 for x in (heads, size, groups)):
        return ()
    assert isinstance(heads, int) and isinstance(size, int) and isinstance(groups, int)  # noqa: PT018  # checked above
    return heads * size, groups * size, groups * size


def split_projections(layer: Layer, scheme: Scheme) -> tuple[Layer, str]:
    """The layer with one weight for each of its projections, if a scale would span them; and a note that says
    so.
    """
    last = layer.name.rpartition(".")[2]
    if not layer.cuts:
        if (
            layer.kind != "linear"
            or last not in FUSED
            or len(layer.weights) > 1
            or not spans_shards(scheme, 0)
        ):
            return layer, ""
        return layer, f"one scale for {', '.join(FUSED[last])}: the model does not say where they end"
    bounds = list(accumulate((rows for _, rows in layer.cuts), initial=0))
    if not spans_shards(scheme, 0) and not any(b % alignment(scheme, 0) for b in bounds[:-1]):
        return layer, ""
    (_, _, k), (part,) = layer.weights[0], next(iter(layer.parts.values()))
    names = [name for name, _ in layer.cuts]
    parts = {x: (Part(part.tensor, None, a, b),) for x, a, b in zip(names, bounds, bounds[1:], strict=False)}
    weights = tuple((name, rows, k) for name, rows in layer.cuts)
    return replace(layer, weights=weights, parts=parts), f"scales of its own for each of {', '.join(names)}"
