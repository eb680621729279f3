"""Which layers a model has: read from tensor names and shapes alone, so that planning needs no weights and no
code.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch

from quantport.errors import ConfigError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_PROJECTION = {**{p: p for p in PROJECTIONS}, "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_EXPERT = re.compile(r"^((?:.+\.)?experts)\.(\d+)\.(\w+)\.weight$")
_FUSED_EXPERTS = re.compile(r"^((?:.+\.)?experts)\.(gate_up_proj|down_proj)$")
HEAD = "output head: left in 16 bits by default"
EMBEDDING = "embedding: looked up, not multiplied"
_HEADS = {"lm_head", "embed_out", "output_projection"}
_ROUTERS = {"gate", "router", "shared_expert_gate", "gate_network"}
_EMBEDDINGS = {
    "wte",
    "wpe",
    "tok_embeddings",
    "word_embeddings",
    "position_embeddings",
    "embeddings",
    "relative_attention_bias",
}


class TensorLike(Protocol):
    """Shape and dtype of one tensor: a safetensors header entry, or a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""


class Part(NamedTuple):
    """Where one weight comes from: rows ``[start, stop)`` of a tensor, or of its slice ``expert`` when it is
    3-D.
    """

    tensor: str
    expert: int | None = None
    start: int | None = None
    stop: int | None = None


@dataclass(frozen=True)
class Layer:
    """One layer of a model.

    Attributes:
        name: Dotted module path.
        kind: ``linear``, ``moe``, or ``other`` (never quantized).
        weights: Logical weights ``(name, n, k)``: one for a linear layer, three for the experts of a MoE
            layer.
        experts: Number of experts, 0 for a linear layer.
        dtype: Stored dtype of the weights.
        parts: Where each weight comes from: ``parts[weight name]`` is one Part, or one for each expert.
        keep: Why it is left alone by default; empty when it is not.
        group: Name of the MoE layer that it is a part of, which patterns may use too; empty for most.
        tied: Names of other layers that share its weight: the output heads of an embedding.
        cuts: Name and rows of each projection of a fused linear layer, where the model says them.
        only: The weights of an experts layer that this piece of it holds (``3.down_proj``), where single
            experts or projections got another scheme than the rest; empty for all.
    """

    name: str
    kind: str
    weights: tuple[tuple[str, int, int], ...]
    dtype: torch.dtype
    experts: int = 0
    parts: Mapping[str, tuple[Part, ...]] = field(default_factory=dict, compare=False, repr=False)
    keep: str = ""
    group: str = ""
    tied: tuple[str, ...] = ()
    cuts: tuple[tuple[str, int], ...] = ()
    only: tuple[str, ...] = ()

    @property
    def lookup(self) -> bool:
        """Whether it is an embedding, whose rows are looked up."""
        return self.keep.startswith(EMBEDDING)

    @property
    def opt_in(self) -> bool:
        """Whether it is left alone by default, but quantized where ``targets`` names it exactly."""
        return self.lookup or self.keep.startswith(HEAD)

    @property
    def each(self) -> tuple[tuple[str, int, int], ...]:
        """Every weight as ``(name, n, k)``: ``("", n, k)`` of a linear layer, ``("3.down_proj", n, k)`` of
        experts.

        A fused layer that is quantized in parts has their names.
        """
        if not self.experts:
            return self.weights if len(self.weights) > 1 else tuple(("", n, k) for _, n, k in self.weights)
        shapes = {name: (n, k) for name, n, k in self.weights}
        names = self.only or (f"{e}.{name}" for e in range(self.experts) for name in shapes)
        return tuple((name, *shapes[name.partition(".")[2]]) for name in names)

    def part(self, weight: str) -> Part:
        """Where a weight of ``each`` comes from."""
        if not self.experts:
            return self.parts[weight or next(iter(self.parts))][0]
        expert, _, projection = weight.partition(".")
        return self.parts[projection][int(expert)]

    @property
    def home(self) -> str:
        """Name of the layer that holds its weights: its own, or that of the experts it is a piece of."""
        return self.group if self.only else self.name

    @property
    def path(self) -> tuple[str, ...]:
        """The names that patterns may use for it, outermost first: an expert that is a module of its own has
        three.
        """
        if self.only or not self.group:
            return (self.home,)
        expert = self.name.removeprefix(f"{self.group}.").partition(".")[0]
        return self.group, f"{self.group}.{expert}", self.name

    @property
    def elements(self) -> int:
        """Number of weight elements."""
        if self.only:
            return sum(n * k for _, n, k in self.each)
        return sum(n * k for _, n, k in self.weights) * max(1, self.experts)

    @property
    def bytes(self) -> int:
        """Bytes of the weights as stored."""
        return self.elements * self.dtype.itemsize

    @property
    def shards(self) -> tuple[str, ...]:
        """The unfused names that patterns may use for parts of this layer; empty when it is not fused."""
        if self.experts:
            experts = tuple(f"{self.name}.{e}" for e in range(self.experts))
            return tuple(f"{self.name}.{weight}" for weight, _, _ in self.each) + experts
        parent, _, last = self.name.rpartition(".")
        return tuple(f"{parent}.{s}".lstrip(".") for s in FUSED.get(last, ()))


def why_kept(name: str) -> str:
    """Why a matrix of this module name is left alone by default, or an empty string."""
    last = name.rpartition(".")[2]
    if last in _HEADS:
        return HEAD
    if last in _ROUTERS or ".router." in f".{name}.":
        return "router: left in 16 bits, it decides which experts run"
    if last in _EMBEDDINGS or "embed" in last:
        return EMBEDDING
    return ""


def tied_scheme(layer: Layer, targets: Mapping[str, str | None]) -> tuple[str | None, str]:
    """The scheme of one weight under several names, and why there is none: ``targets`` names all of them
    alike, or none.

    Raises:
        ConfigError: only some are named, or they are to have different schemes.
    """
    names = (layer.name, *layer.tied)
    asked = {name: targets[name] for name in names if name in targets}
    if not asked:
        return None, layer.keep
    scheme = next(iter(asked.values()))
    if len(asked) < len(names) or set(asked.values()) != {scheme}:
        said = ", ".join(f"{name} -> {asked.get(name, 'nothing')}" for name in names)
        suggestion = (
            f"name each of {', '.join(names)} in targets, with one scheme; it is quantized and kept once"
        )
        raise ConfigError(
            f"the scheme of {next(iter(asked))}",
            f"one tied weight under {len(names)} names: {said}",
            suggestion,
        )
    return scheme, "" if scheme else f"left alone by pattern {layer.name!r}"


def find_layers(tensors: Mapping[str, TensorLike]) -> list[Layer]:
    """Groups tensors into layers.

    Args:
        tensors: Name -> anything with ``shape`` and ``dtype``, in checkpoint order.

    Returns:
        Linear layers (2-D ``*.weight``), MoE layers (``*.experts`` with gate, up and down projections, stored
        per expert or fused in 3-D), and everything else as kind ``other``, in checkpoint order.
    """
    layers: dict[str, Layer] = {}
    experts: dict[str, dict[str, dict[int, Part]]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.match(name):
            base, index, projection = match.groups()
            if projection in _PROJECTION and len(tensor.shape) == 2:
                experts.setdefault(base, {}).setdefault(_PROJECTION[projection], {})[int(index)] = Part(name)
                continue
        if (match := _FUSED_EXPERTS.match(name)) and len(tensor.shape) == 3 and all(tensor.shape):
            for projection, part in _split(name, match[2], tensor):
                experts.setdefault(match[1], {}).setdefault(projection, {})[part.expert or 0] = part
            continue
        layers[name] = _single(name, tensor)
    for base, projections in experts.items():
        layers.update({layer.name: layer for layer in _experts(base, projections, tensors)})
    order = {name: i for i, name in enumerate(tensors)}
    return sorted(
        layers.values(),
        key=lambda x: min((order[p.tensor] for ps in x.parts.values() for p in ps), default=0),
    )


def _split(name: str, projection: str, tensor: TensorLike) -> Iterable[tuple[str, Part]]:
    for e in range(tensor.shape[0]):
        if projection == "down_proj":
            yield projection, Part(name, e)
        else:
            half = tensor.shape[1] // 2
            yield "gate_proj", Part(name, e, 0, half)
            yield "up_proj", Part(name, e, half, 2 * half)


def _single(name: str, tensor: TensorLike) -> Layer:
    module, _, leaf = name.rpartition(".")
    part = {leaf: (Part(name),)}
    if leaf != "weight" or len(tensor.shape) != 2:
        return Layer(
            name,
            "other",
            ((leaf, 1, math.prod(tensor.shape)),),
            tensor.dtype,
            parts=part,
            keep="not a matrix of a layer",
        )
    n, k = tensor.shape
    keep = why_kept(module)
    if tensor.dtype not in FLOATS:
        keep = f"stored as {tensor.dtype}"
    elif n == 0 or k == 0:
        keep = "zero-size weight"
    return Layer(module, "linear", ((leaf, n, k),), tensor.dtype, parts=part, keep=keep)


def _experts(
    base: str, projections: dict[str, dict[int, Part]], tensors: Mapping[str, TensorLike]
) -> Iterable[Layer]:
    """One MoE layer, or single layers when the experts are not uniform gate, up and down projections."""
    used = {p.tensor: p for parts in projections.values() for p in parts.values()}
    dtypes = {tensors[name].dtype for name in used}
    weights = _uniform(projections, tensors)
    if weights and len(dtypes) == 1:
        count = len(projections["gate_proj"])
        parts = {p: tuple(projections[p][e] for e in range(count)) for p in PROJECTIONS}
        dtype = dtypes.pop()
        empty = "" if all(n * k for _, n, k in weights) else "zero-size weight"
        yield Layer(
            base, "moe", weights, dtype, count, parts, empty if dtype in FLOATS else f"stored as {dtype}"
        )
        return
    for name, part in used.items():
        single = _single(name, tensors[name])
        yield (
            single
            if part.expert is None
            else replace(single, keep="experts that are not stored as gate, up [I, H] and down [H, I]")
        )


def _uniform(
    projections: dict[str, dict[int, Part]], tensors: Mapping[str, TensorLike]
) -> tuple[tuple[str, int, int], ...] | None:
    """The weights of every expert, when all experts have gate and up [I, H] and down [H, I]; else None."""
    if set(projections) != set(PROJECTIONS):
        return None
    indices = {tuple(sorted(parts)) for parts in projections.values()}
    shapes = [{_shape(part, tensors) for part in projections[p].values()} for p in PROJECTIONS]
    if (
        len(indices) != 1
        or any(len(s) != 1 for s in shapes)
        or indices != {tuple(range(len(next(iter(indices)))))}
    ):
        return None
    gate, up, down = (s.pop() for s in shapes)
    fused = next(iter(projections["gate_proj"].values()))
    whole = fused.expert is None or tensors[fused.tensor].shape[1] == 2 * gate[0]
    if gate != up or down != gate[::-1] or not whole:
        return None
    return tuple((p, *shape) for p, shape in zip(PROJECTIONS, (gate, up, down), strict=True))


def _shape(part: Part, tensors: Mapping[str, TensorLike]) -> tuple[int, int]:
    shape = tensors[part.tensor].shape
    rows = shape[-2] if part.start is None or part.stop is None else part.stop - part.start
    return rows, shape[-1]


def uneven(layers: Iterable[Layer]) -> dict[str, str]:
    """Why experts that were found one by one are no MoE layer: what is absent or has another shape, by their
    common name.
    """
    found: dict[str, dict[str, dict[int, tuple[int, int]]]] = {}
    for layer in layers:
        if (
            layer.kind == "linear"
            and (match := _EXPERT.match(f"{layer.name}.weight"))
            and match[3] in _PROJECTION
        ):
            found.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = layer.weights[0][1:]
    out = {}
    for base, projections in found.items():
        last = max(e for shapes in projections.values() for e in shapes)
        for projection, shapes in projections.items():
            usual = Counter(shapes.values()).most_common(1)[0][0]
            wrong = [e for e in range(last + 1) if shapes.get(e) != usual]
            if wrong and base not in out:
                has = list(shapes[wrong[0]]) if wrong[0] in shapes else "absent"
                out[base] = f"{base}.{wrong[0]}.{projection} is {has}, where most are {list(usual)}"
        out.setdefault(base, f"{base} has only {', '.join(projections)}, or stores them in several dtypes")
    return out
