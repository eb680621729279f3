"""Splits the experts of a MoE layer where patterns give single experts or projections another scheme than the
rest.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from quantport.config import QuantConfig
from quantport.errors import ConfigError
from quantport.model.layers import Layer
from quantport.model.patterns import compile_pattern

Decision = tuple[str | None, str]


def split(layer: Layer, config: QuantConfig, default: str | None) -> list[tuple[Layer, str | None, str]]:
    """Chooses the scheme of a layer, or of each piece of it.

    Args:
        layer: The layer.
        config: The configuration.
        default: The scheme where the configuration names none.

    Returns:
        ``(layer, scheme or None, why it is left alone)``: one entry for most layers. For experts that differ,
        one for the rest, under the name of the layer, and one for each projection of all experts
        (``experts.*.down_proj``), expert (``experts.3``) or projection (``experts.3.down_proj``) that got
        another scheme.
    """
    whole = config.for_layer(layer, default)
    inner = config.of_component(layer) if layer.experts else None
    if inner is None or not (inner.ignore or inner.targets):
        return [(layer, *whole)]
    names = set(layer.shards)
    if layer.keep and not any(p in names and scheme for p, scheme in inner.targets.items()):
        return [(layer, *whole)]
    decided = _decisions(layer, inner, whole)
    if len({scheme for scheme, _ in decided.values()}) == 1:
        return [(layer, *next(iter(decided.values())))]
    pieces = {unit: members for unit, members in _units(layer, decided) if decided[members[0]][0] != whole[0]}
    taken = {weight for members in pieces.values() for weight in members}
    rest = tuple(weight for weight in decided if weight not in taken)
    out = [(_piece(layer, layer.name, rest), *whole)] if rest else []
    return out + [(_piece(layer, f"{layer.name}.{unit}", m), *decided[m[0]]) for unit, m in pieces.items()]


def _decisions(layer: Layer, config: QuantConfig, whole: Decision) -> dict[str, Decision]:
    """What each weight gets."""
    out = {}
    for weight, _, _ in layer.each:
        expert = weight.partition(".")[0]
        found = config.decide((layer.name, f"{layer.name}.{expert}", f"{layer.name}.{weight}"))
        out[weight] = (
            whole if found is None else (found[0], "" if found[0] else f"left alone by pattern {found[1]!r}")
        )
    return out


def _units(layer: Layer, decided: Mapping[str, Decision]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The largest groups of weights that share a scheme: a projection of all experts, an expert, a single
    weight.
    """

    def agree(names: Iterable[str]) -> bool:
        return len({decided[name][0] for name in names}) == 1

    projections = [name for name, _, _ in layer.weights]
    columns = {p: tuple(f"{e}.{p}" for e in range(layer.experts)) for p in projections}
    uniform = [p for p in projections if agree(columns[p])]
    yield from ((f"*.{p}", columns[p]) for p in uniform)
    for e in range(layer.experts):
        left = tuple(f"{e}.{p}" for p in projections if p not in uniform)
        if len(left) == len(projections) and agree(left):
            yield str(e), left
        else:
            yield from ((name, (name,)) for name in left)


def _piece(layer: Layer, name: str, only: tuple[str, ...]) -> Layer:
    used = {weight.partition(".")[2] for weight in only}
    weights = tuple(w for w in layer.weights if w[0] in used)
    return replace(layer, name=name, weights=weights, group=layer.name, only=only)


def check_patterns(config: QuantConfig, layers: Sequence[Layer]) -> None:
    """Every pattern must match something: a silent no-op is the most reported failure of this field.

    Raises:
        ConfigError: one matches nothing.
    """
    names = list(dict.fromkeys(name for layer in layers for name in (layer.name, *layer.path, *layer.tied)))
    for pattern in config.patterns():
        compiled = compile_pattern(pattern)
        if any(compiled.match(n) for n in names) or any(compiled.match(s) for x in layers for s in x.shards):
            continue
        inside = f"*{pattern}*"
        tied = (
            " (an output head tied to the embedding is no layer of its own)"
            if pattern.rpartition(".")[2] == "lm_head"
            else ""
        )
        hint = f"did you mean {inside!r}? " if any(compile_pattern(inside).match(n) for n in names) else ""
        close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
        error = ConfigError(
            f"pattern {pattern!r}",
            f"it matches none of {len(names)} layers{tied}",
            f"{hint}close names: {', '.join(close) or 'none'}; on_unmatched='warn' to go on",
        )
        if config.on_unmatched == "error":
            raise error
        warnings.warn(str(error), UserWarning, stacklevel=3)
