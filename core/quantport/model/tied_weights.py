"""Tied weights: an embedding and the output heads that share its weight are one layer, quantized once and
kept once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from quantport.model.layers import Layer
from quantport.model.roles import Role, SkipCode, SkipReason


def partners(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Path of each module whose ``weight`` others hold too -> the paths of those.

    By identity, and by what a Transformers model says (``all_tied_weights_keys``), which on the meta device
    is not tied yet.
    """
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    said: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in said.items():
        a, b = target.removesuffix(".weight"), source.removesuffix(".weight")
        group = next((g for g in owners.values() if b in g), None)
        other = next((g for g in owners.values() if a in g), None)
        if group is not None and other is not None and group is not other:
            group += other
            other.clear()
    return {
        path: tuple(p for p in group if p != path)
        for group in owners.values()
        for path in group
        if len(group) > 1
    }


def from_config(layers: Iterable[Layer], config: Mapping[str, Any]) -> list[Layer]:
    """Ties the layers of a checkpoint as its ``config.json`` says, for planning without a model."""
    out = list(layers)
    tables = [x for x in out if x.role is Role.EMBEDDING and x.opt_in]
    if not config.get("tie_word_embeddings") or not tables:
        return out
    table = max(tables, key=lambda x: x.weights[0][1])
    heads = tuple(x.name for x in out if x.role is Role.HEAD and x.opt_in) or ("lm_head",)
    return one_layer([replace(x, tied=heads) if x is table else x for x in out])


def one_layer(layers: Sequence[Layer]) -> list[Layer]:
    """Takes output heads that are stored beside the embedding that they are tied to for what they are: second
    copies.
    """
    owner = {name: x.name for x in layers for name in x.tied}
    return [
        replace(
            x,
            name=f"{x.name}.weight",
            kind="other",
            skip_reason=SkipReason(
                SkipCode.SECOND_COPY, f"a second copy of {owner[x.name]}, to which it is tied"
            ),
        )
        if x.name in owner
        else x
        for x in layers
    ]


def why_not_embedding(module: nn.Module, others: Iterable[nn.Module]) -> SkipReason | None:
    """Why an embedding cannot become a ``QuantEmbedding``, or None."""
    strange = next((type(m).__name__ for m in others if type(m) is not nn.Linear), "")
    if type(module) is not nn.Embedding:
        text = f"its module is a {type(module).__name__}, not a plain torch.nn.Embedding"
    elif module.max_norm is not None:
        text = "it renormalizes its rows (max_norm)"
    elif strange:
        text = f"its weight is tied to a {strange}, not to plain torch.nn.Linear modules"
    else:
        return None
    return SkipReason(SkipCode.OTHER_EMBEDDING, text)
