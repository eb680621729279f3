"""Which scheme each weight gets, and why: from the layers of a model and a configuration, in one pass.

What decides, strongest first: a component mapped to null; that a layer is left alone by default, unless
``targets`` names it; patterns; the first blocks; ``linear`` and ``moe``; ``scheme``; the default. Experts are
split where patterns tell some of them from the rest.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from quantport.config.schema import QuantConfig
from quantport.errors import ConfigError, one_of
from quantport.model.layers import Layer
from quantport.model.patterns import bounded, compile_pattern
from quantport.model.roles import SkipCode, SkipReason

_DUALSCALE_BLOCKS = 5
_BLOCK = re.compile(r"(?:^|\.)(blocks|layers|h|transformer_blocks|single_transformer_blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Assignment:
    """What a layer, or a piece of one, gets.

    Attributes:
        layer: The layer; or a piece of it, under a name of its own.
        scheme: Name of its scheme; None where it is left alone.
        skip_reason: Why it is left alone.
        stored: Whether that is the scheme that the checkpoint stores it in, since nothing else was asked for.
    """

    layer: Layer
    scheme: str | None
    skip_reason: SkipReason | None = None
    stored: bool = False


class _Decision(NamedTuple):
    """A scheme, or None and why."""

    scheme: str | None
    skip_reason: SkipReason | None = None


def needs_default(config: QuantConfig) -> bool:
    """Whether the configuration names no scheme for some layers, so that the device has to choose one."""
    inner = [c for c in config.components.values() if c] or [config]
    return not config.scheme and any(
        not c.scheme and not {"linear", "moe"} <= c.model_fields_set for c in inner
    )


StoredSchemes = Mapping[str, Mapping[str, str]]
"""Names of schemes that weights are stored in: ``Layer.home`` -> name of ``Layer.each`` -> scheme."""


def resolve(
    layers: Sequence[Layer],
    config: QuantConfig,
    default_scheme: str | None,
    stored: StoredSchemes = MappingProxyType({}),
) -> list[Assignment]:
    """Says which scheme each weight of a model gets, and why.

    Args:
        layers: The layers of the model.
        config: A checked configuration.
        default_scheme: Name of the scheme where the configuration names none.
        stored: What is quantized already, which keeps its scheme where it is left alone.

    Returns:
        One assignment for most layers, in their order. For experts that differ, one for the rest, under the
        name of the layer, and one for each projection of all experts (``experts.*.down_proj``), expert
        (``experts.3``) or projection (``experts.3.down_proj``) that got another scheme.

    Raises:
        ConfigError: patterns that match nothing or conflict, parts that disagree, or a component without an
            entry.
    """
    with bounded():
        check_patterns(config, layers)
        return [
            kept
            for layer in layers
            for assignment in _assign(layer, config, default_scheme)
            for kept in _keep(assignment, stored.get(layer.home, {}))
        ]


def _assign(layer: Layer, config: QuantConfig, default: str | None) -> list[Assignment]:
    while config.components:
        component = component_of(layer, config)
        inner, default = config.components[component], config.scheme or default
        if inner is None:
            text = f"component {component!r} is mapped to null"
            return [Assignment(layer, None, SkipReason(SkipCode.NULL_COMPONENT, text))]
        config = inner
    whole = _decide(layer, config, default)
    if layer.experts and (config.ignore or config.targets):
        return _split_experts(layer, config, whole)
    return [Assignment(layer, *whole)]


def _keep(assignment: Assignment, stored: Mapping[str, str]) -> Iterator[Assignment]:
    """What is left alone, in the schemes that it is stored in; everything else as it was."""
    layer = assignment.layer
    if assignment.scheme or not stored:
        yield assignment
        return
    # BF16 beside quantized weights is what was left alone
    schemes = {w: stored[w] for w, _, _ in layer.each}
    uniform = len(set(schemes.values())) == 1
    kept = {
        w: _Decision(s if uniform or s != "bf16" else None, assignment.skip_reason)
        for w, s in schemes.items()
    }
    most = Counter(kept.values()).most_common(1)[0][0]
    if uniform:
        pieces = [replace(assignment, scheme=most.scheme)]
    elif layer.only:
        pieces = [Assignment(_piece(layer, f"{layer.home}.{w}", (w,)), *kept[w]) for w in kept]
    else:
        pieces = _pieces(layer, kept, most)
    yield from (replace(piece, stored=piece.scheme is not None) for piece in pieces)


def component_of(layer: Layer, config: QuantConfig) -> str:
    """The component of a configuration that a layer is in: the longest prefix of its name that ends at a dot.

    Raises:
        ConfigError: it is in none.
    """
    inside = [c for c in config.components if _is_inside(layer.name, c)]
    if not inside:
        raise ConfigError(
            f"the component of {layer.name}",
            f"the configuration maps only: {', '.join(config.components)}",
            f"add {layer.name.partition('.')[0]!r}: a configuration, or null to leave it alone",
        )
    return max(inside, key=len)


def _decide(layer: Layer, config: QuantConfig, default: str | None) -> _Decision:
    """What a layer gets as a whole."""
    if layer.tied:
        return _by_tied_names(layer, config.targets)
    if layer.skip_reason and layer.name not in config.targets:
        return _Decision(None, layer.skip_reason)
    fused = layer.shards and not layer.experts
    by_pattern = _by_shards(layer, config) if fused else _by_patterns(layer.path, config)
    return by_pattern or _by_kind(layer, config, default)


def _by_kind(layer: Layer, config: QuantConfig, default: str | None) -> _Decision:
    """What no pattern speaks for."""
    scheme, skip = config.scheme or default, None
    if layer.kind in ("linear", "moe") and layer.kind in config.model_fields_set:
        scheme = config.linear if layer.kind == "linear" else config.moe
        skip = SkipReason(SkipCode.NULL_SCHEME, f"left alone by {layer.kind}=null")
    if first := _in_first_blocks(layer.name, config.num_bf16_fallback_layers, scheme):
        return _Decision(None, first)
    return _Decision(scheme) if scheme else _Decision(None, skip)


def _in_first_blocks(name: str, count: int | None, scheme: str | None) -> SkipReason | None:
    block = _BLOCK.search(name)
    if block and count is None and block[1] == "blocks" and str(scheme).startswith("mxfp4_dualscale"):
        count = _DUALSCALE_BLOCKS
    if not block or int(block[2]) >= (count or 0):
        return None
    text = f"left alone by num_bf16_fallback_layers={count}: it is in block {block[2]}"
    return SkipReason(SkipCode.FIRST_BLOCKS, text)


def _by_tied_names(layer: Layer, targets: Mapping[str, str | None]) -> _Decision:
    """One weight under several names: ``targets`` names all of them alike, or none."""
    names = (layer.name, *layer.tied)
    schemes = {name: targets[name] for name in names if name in targets}
    if not schemes:
        return _Decision(None, layer.skip_reason)
    scheme = next(iter(schemes.values()))
    if len(schemes) < len(names) or set(schemes.values()) != {scheme}:
        raise ConfigError(
            f"the scheme of {next(iter(schemes))}",
            f"one tied weight under {len(names)} names: "
            + ", ".join(f"{name} -> {schemes.get(name, 'nothing')}" for name in names),
            f"name each of {', '.join(names)} in targets, with one scheme; it is quantized and kept once",
        )
    return _Decision(scheme) if scheme else _Decision(None, _left_by(layer.name))


def _by_shards(layer: Layer, config: QuantConfig) -> _Decision | None:
    """What patterns say of a fused layer and of its parts, which are stored as one.

    A pattern that matches some of the parts speaks for those, even where the name of the layer ends like one
    of them: ``*v_proj`` is not meant for all of ``qkv_proj``.
    """
    partial = {
        pattern
        for pattern in (*config.ignore, *config.targets)
        if 0 < sum(bool(compile_pattern(pattern).match(shard)) for shard in layer.shards) < len(layer.shards)
    }
    decisions = {s: _by_patterns((*layer.path, s), config, {layer.name: partial}) for s in layer.shards}
    outcomes: dict[str, str] = {}
    for shard, decision in decisions.items():
        outcome = "no pattern" if decision is None else decision.scheme or "ignored"
        outcomes.setdefault(outcome, shard)
    if len(outcomes) > 1:
        raise ConfigError(
            f"one scheme for {layer.name}",
            "its parts disagree: "
            + ", ".join(f"{shard} -> {outcome}" for outcome, shard in outcomes.items()),
            "the parts of a fused layer are stored as one: match all of them, none of them, or "
            f"{layer.name!r} itself",
        )
    return next(iter(decisions.values()))


def _by_patterns(
    names: Sequence[str], config: QuantConfig, not_for: Mapping[str, set[str]] = MappingProxyType({})
) -> _Decision | None:
    """What patterns say, or None where they say nothing.

    Args:
        names: Of something and of what it is inside, outermost first: experts, one of them, its projection.
            A pattern speaks for the outermost that it matches, and the innermost that is spoken for decides.
        config: The configuration.
        not_for: Patterns that do not speak for a name, whether they match it or not.
    """
    patterns = (*config.ignore, *config.targets)
    spoken, decision = set[str](), None
    for name in names if patterns else ():
        matching = {p for p in patterns if compile_pattern(p).match(name)} - spoken - not_for.get(name, set())
        decision = _by_matching(name, matching, config) or decision
        spoken |= matching
    return decision


def _by_matching(name: str, matching: set[str], config: QuantConfig) -> _Decision | None:
    """What the patterns that match a name say together."""
    if not matching:
        return None
    ignored = [p for p in config.ignore if p in matching]
    targets = {p: s for p, s in config.targets.items() if p in matching}
    if (ignored and targets) or len(set(targets.values())) > 1:
        raise ConfigError(
            f"the scheme of {name}",
            f"it matches {', '.join(map(repr, [*ignored, *targets]))}, which disagree",
            "make the patterns exclude each other",
        )
    pattern, scheme = (ignored[0], None) if ignored else next(iter(targets.items()))
    return _Decision(scheme) if scheme else _Decision(None, _left_by(pattern))


def _left_by(pattern: str) -> SkipReason:
    return SkipReason(SkipCode.PATTERN, f"left alone by pattern {pattern!r}")


def _split_experts(layer: Layer, config: QuantConfig, whole: _Decision) -> list[Assignment]:
    """The experts of a layer, in pieces where patterns give some of them another scheme than the rest."""
    if layer.skip_reason:
        inside = set(layer.shards)
        if not any(pattern in inside and scheme for pattern, scheme in config.targets.items()):
            return [Assignment(layer, *whole)]
    decisions = {}
    for weight, _, _ in layer.each:
        expert = weight.partition(".")[0]
        names = (layer.name, f"{layer.name}.{expert}", f"{layer.name}.{weight}")
        decisions[weight] = _by_patterns(names, config) or whole
    return _pieces(layer, decisions, whole)


def _pieces(layer: Layer, decisions: Mapping[str, _Decision], whole: _Decision) -> list[Assignment]:
    """Experts, each of whose weights gets what was decided for it; what most get is one piece."""
    if len({decision.scheme for decision in decisions.values()}) == 1:
        return [Assignment(layer, *next(iter(decisions.values())))]
    units = [(u, ws) for u, ws in _units(layer, decisions) if decisions[ws[0]].scheme != whole.scheme]
    apart = {weight for _, weights in units for weight in weights}
    rest = tuple(weight for weight in decisions if weight not in apart)
    pieces = [Assignment(_piece(layer, layer.name, rest), *whole)] if rest else []
    return pieces + [
        Assignment(_piece(layer, f"{layer.name}.{unit}", weights), *decisions[weights[0]])
        for unit, weights in units
    ]


def _units(layer: Layer, decisions: Mapping[str, _Decision]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The largest groups of weights that share a scheme: a projection of all experts, an expert, a single
    weight.
    """

    def agree(weights: Iterable[str]) -> bool:
        return len({decisions[weight].scheme for weight in weights}) == 1

    projections = [name for name, _, _ in layer.weights]
    columns = {p: tuple(f"{e}.{p}" for e in range(layer.experts)) for p in projections}
    uniform = [p for p in projections if agree(columns[p])]
    yield from ((f"*.{p}", columns[p]) for p in uniform)
    for e in range(layer.experts):
        left = tuple(f"{e}.{p}" for p in projections if p not in uniform)
        if len(left) == len(projections) and agree(left):
            yield str(e), left
        else:
            yield from ((weight, (weight,)) for weight in left)


def _piece(layer: Layer, name: str, only: tuple[str, ...]) -> Layer:
    projections = {weight.partition(".")[2] for weight in only}
    weights = tuple(w for w in layer.weights if w[0] in projections)
    return replace(layer, name=name, weights=weights, group=layer.home, only=only)


def check_patterns(config: QuantConfig, layers: Sequence[Layer]) -> None:
    """Every pattern must match something, and every component hold a layer: a silent no-op is the most
    reported failure of this field.

    Raises:
        ConfigError: one matches nothing.
    """
    patterns, components = config.patterns(), list(_components(config))
    if not (patterns or components):
        return
    names = list(dict.fromkeys(name for layer in layers for name in (layer.name, *layer.path, *layer.tied)))
    shards = [shard for layer in layers for shard in layer.shards]
    for pattern in patterns:
        matches = compile_pattern(pattern).match
        if any(map(matches, names)) or any(map(matches, shards)):
            continue
        _refuse(_unmatched(pattern, names), config)
    for component in components:
        if not any(_is_inside(name, component) for name in names):
            known = dict.fromkeys(name.partition(".")[0] for name in names)
            found = f"none of {len(names)} layers is in it"
            _refuse(ConfigError(f"component {component!r}", found, one_of(component, known)), config)


def _refuse(error: ConfigError, config: QuantConfig) -> None:
    """Raises what matches nothing, or warns of it."""
    if config.on_unmatched == "error":
        raise error
    warnings.warn(str(error), UserWarning, stacklevel=5)


def _components(config: QuantConfig) -> Iterator[str]:
    """Those of a configuration, and those inside them."""
    for name, inner in config.components.items():
        yield name
        yield from _components(inner) if inner else ()


def _is_inside(layer: str, component: str) -> bool:
    return layer == component or layer.startswith(f"{component}.")


def _unmatched(pattern: str, names: Sequence[str]) -> ConfigError:
    inside = f"*{pattern}*"
    is_head = pattern.rpartition(".")[2] == "lm_head"
    tied = " (an output head tied to the embedding is no layer of its own)" if is_head else ""
    hint = f"did you mean {inside!r}? " if any(map(compile_pattern(inside).match, names)) else ""
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
    return ConfigError(
        f"pattern {pattern!r}",
        f"it matches none of {len(names)} layers{tied}",
        f"{hint}close names: {', '.join(close) or 'none'}; on_unmatched='warn' to go on",
    )
