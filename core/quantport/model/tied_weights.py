"""Tied weights: an embedding and the output heads that share its weight are one layer, quantized once and
kept once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    for target, source in said_ties(model).items():
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


def said_ties(model: nn.Module) -> dict[str, str]:
    """Each parameter that Transformers models, which may be parts of this one, tie -> the one that it is tied
    to.
    """
    out = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        said: Any = getattr(module, "all_tied_weights_keys", None) or {}
        out.update({f"{prefix}{target}": f"{prefix}{source}" for target, source in said.items()})
    return out


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Each parameter of a model once: one that is tied under the name of that which it is tied to, as it is
    stored.
    """
    said, every = said_ties(model), list(model.named_parameters(remove_duplicate=False))
    names: dict[int, str] = {}
    for name, parameter in sorted(every, key=lambda item: item[0] in said):
        names.setdefault(id(parameter), name)
    return {name: parameter for name, parameter in every if names[id(parameter)] == name}


def undecided_tie(target: str, other: str) -> str:
    """What only loading can settle: a weight that is stored beside the one that it is tied to is one with it
    where the bytes are equal, and another where they are not. Until then it counts as another.
    """
    a, b = target.removesuffix(".weight"), other.removesuffix(".weight")
    return (
        f"{a} is tied to {b} by the configuration, and stored beside it: one weight if load finds equal "
        "bytes, else what is stored is used; it is counted as another weight here"
    )


def from_config(layers: Iterable[Layer], config: Mapping[str, Any]) -> tuple[list[Layer], tuple[str, ...]]:
    """Ties the layers of a checkpoint whose ``config.json`` ties its head, for planning without a model.

    Returns:
        The layers, and what is undecided of them.
    """
    out = list(layers)
    text = config.get("text_config")
    parts = (config, text if isinstance(text, Mapping) else {})
    tables = [x for x in out if x.role is Role.EMBEDDING and x.opt_in]
    if not tables or not any(part.get("tie_word_embeddings") for part in parts):
        return out, ()
    table = max(tables, key=lambda x: x.weights[0][1])
    heads = [x.name for x in out if x.role is Role.HEAD and x.opt_in]
    if not heads:
        return [replace(x, tied=("lm_head",)) if x is table else x for x in out], ()
    return out, tuple(undecided_tie(head, table.name) for head in heads)


def untie(model: nn.Module, target: str) -> None:
    """Gives a parameter of a model on meta that is tied to another one a place of its own.

    A Transformers model does not tie it again: neither by ``tie_weights`` nor, where nothing else is tied, by
    its configuration.
    """
    path, _, leaf = target.rpartition(".")
    module = model.get_submodule(path)
    shared = module._parameters.get(leaf)
    if shared is not None:
        module._parameters[leaf] = nn.Parameter(shared.detach().clone(), shared.requires_grad)
    forget_tie(model, target)
    config: Any = getattr(model, "config", None)
    if config is not None and not said_ties(model):
        for part in (config, *(v for v in vars(config).values() if hasattr(v, "tie_word_embeddings"))):
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False


def forget_tie(model: nn.Module, target: str) -> None:
    """Tells a Transformers model, and the parts of it, that a parameter is tied to nothing."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        inner = target.removeprefix(prefix)
        for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
            keys = getattr(module, attribute, None)
            if target.startswith(prefix) and isinstance(keys, Mapping) and inner in keys:
                kept: Any = {key: source for key, source in keys.items() if key != inner}
                setattr(module, attribute, kept)  # of this model, not of its class


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
