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
from torch import Tensor

from quantport.model.roles import NOT_LOADED, Role, SkipCode, SkipReason, role_of, skipped_by_default
from quantport.model.routers import find_routers

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_PROJECTION = {**{p: p for p in PROJECTIONS}, "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_EXPERT = re.compile(r"^((?:.+\.)?experts)\.(\d+)\.(\w+)\.weight$")
FUSED_EXPERTS = re.compile(r"^((?:.+\.)?experts)\.(gate_up_proj|down_proj)$")
_CONVOLUTION = (3, 4, 5)  # dimensions of a weight over one, two or three of space
_UNEVEN = SkipReason(
    SkipCode.UNEVEN_EXPERTS, "experts that are not stored as gate, up [I, H] and down [H, I]"
)
_NOT_A_MATRIX = SkipReason(SkipCode.NOT_A_MATRIX, "not a matrix of a layer")
CONVOLUTION = SkipReason(SkipCode.CONVOLUTION, "convolution: left in 16 bits")
_OTHER_PARAMETER = SkipReason(SkipCode.OTHER_PARAMETER, "no weight of a linear layer: left in 16 bits")


class TensorLike(Protocol):
    """Shape and dtype of one tensor: a safetensors header entry, or a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""


class Part(NamedTuple):
    """Where one weight comes from: every ``step``-th of the rows ``[start, stop)`` of a tensor, or of its
    slice ``expert``: of a 3-D tensor, or of a 2-D one in which ``experts`` matrices of equal sizes lie one
    below the other. Where it is stored transposed, as ``[in_features, out_features]``, rows are those of the
    weight. Of these rows, where ``columns`` says so, only the columns ``[first, last)``.
    """

    tensor: str
    expert: int | None = None
    start: int | None = None
    stop: int | None = None
    step: int = 1
    transposed: bool = False
    experts: int | None = None
    columns: tuple[int, int] | None = None

    @property
    def in_place(self) -> bool:
        """Whether its rows lie one after the other in the file."""
        return self.step == 1 and not self.transposed

    def rows(self, start: int, stop: int) -> Part:
        """Rows ``[start, stop)`` of the weight."""
        first = self.start or 0
        return self._replace(start=first + self.step * start, stop=first + self.step * stop)

    def select(self, tensor: Tensor) -> Tensor:
        """The weight, out of the whole tensor."""
        if self.expert is not None:
            tensor = (tensor.unflatten(0, (self.experts, -1)) if self.experts else tensor)[self.expert]
        return self.select_rows(tensor)

    def select_rows(self, matrix: Tensor) -> Tensor:
        """The weight, out of the matrix in which it is stored."""
        return self.select_columns(
            (matrix.T if self.transposed else matrix)[self.start : self.stop : self.step]
        )

    def select_columns(self, rows: Tensor) -> Tensor:
        """The columns of the weight, out of its rows."""
        return rows[:, slice(*self.columns)] if self.columns else rows


@dataclass(frozen=True)
class Layer:
    """One layer of a model.

    Attributes:
        name: Dotted module path.
        kind: What kernels are asked for: ``linear``, ``moe``, or ``other`` (never quantized).
        weights: Logical weights ``(name, n, k)``: one for a linear layer, three for the experts of a MoE
            layer.
        experts: Number of experts, 0 for a linear layer.
        dtype: Stored dtype of the weights.
        parts: Where each weight comes from: ``parts[weight name]`` is one Part, or one for each expert.
        role: What it is in the model.
        skip_reason: Why it is left alone by default; None when it is not.
        group: Name of the MoE layer that it is a part of, which patterns may use too; empty for most.
        tied: Names of other layers that share its weight: the output heads of an embedding.
        cuts: Name and rows of each projection of a fused linear layer, where the model says them.
        only: The weights of an experts layer that this piece of it holds (``3.down_proj``), where single
            experts or projections got another scheme than the rest; empty for all.
        held_dtype: Dtype that it is held in where it stays; None for that in which it is stored.
        stored_bytes: Bytes of the codes that it is stored as; None where it is stored in ``dtype``.
    """

    name: str
    kind: str
    weights: tuple[tuple[str, int, int], ...]
    dtype: torch.dtype
    experts: int = 0
    parts: Mapping[str, tuple[Part, ...]] = field(default_factory=dict, compare=False, repr=False)
    role: Role = Role.LINEAR
    skip_reason: SkipReason | None = None
    group: str = ""
    tied: tuple[str, ...] = ()
    cuts: tuple[tuple[str, int], ...] = ()
    only: tuple[str, ...] = ()
    held_dtype: torch.dtype | None = None
    stored_bytes: int | None = None

    @property
    def loaded(self) -> bool:
        """Whether any of it is loaded: it is no second copy, and the model has a place for it."""
        return self.skip_reason is None or self.skip_reason.code not in NOT_LOADED

    @property
    def opt_in(self) -> bool:
        """Whether it is left alone by default, but quantized where ``targets`` names it exactly."""
        return self.skipped_as(SkipCode.ROLE) and self.role is not Role.ROUTER

    @property
    def is_matrix(self) -> bool:
        """Whether it holds a matrix or a stack of them, rather than a vector or a number."""
        return self.kind != "other" or self.weights[0][1] > 1

    def skipped_as(self, code: SkipCode) -> bool:
        """Whether it is left alone by default, and for this reason."""
        return self.skip_reason is not None and self.skip_reason.code is code

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
        return self.elements * self.dtype.itemsize if self.stored_bytes is None else self.stored_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes of the weights in memory, where they stay."""
        return self.elements * (self.held_dtype or self.dtype).itemsize if self.loaded else 0

    @property
    def shards(self) -> tuple[str, ...]:
        """The unfused names that patterns may use for parts of this layer; empty when it is not fused."""
        if self.experts:
            experts = tuple(f"{self.name}.{e}" for e in range(self.experts))
            return tuple(f"{self.name}.{weight}" for weight, _, _ in self.each) + experts
        parent, _, last = self.name.rpartition(".")
        return tuple(f"{parent}.{s}".lstrip(".") for s in FUSED.get(last, ()))


def find_layers(tensors: Mapping[str, TensorLike]) -> list[Layer]:
    """Groups tensors into layers.

    Args:
        tensors: Name -> anything with ``shape`` and ``dtype``, in checkpoint order.

    Returns:
        Linear layers (2-D ``*.weight``), MoE layers (``*.experts`` with gate, up and down projections, stored
        per expert or fused in 3-D), and everything else as kind ``other``, in checkpoint order. The weight of
        kind ``other`` that is a matrix, or a stack of them, has all dimensions but the last as rows.
    """
    layers: dict[str, Layer] = {}
    experts: dict[str, dict[str, dict[int, Part]]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.match(name):
            base, index, projection = match.groups()
            if projection in _PROJECTION and len(tensor.shape) == 2:
                experts.setdefault(base, {}).setdefault(_PROJECTION[projection], {})[int(index)] = Part(name)
                continue
        if (match := FUSED_EXPERTS.match(name)) and len(tensor.shape) == 3 and all(tensor.shape):
            for projection, part in _split(name, tensor):
                experts.setdefault(match[1], {}).setdefault(projection, {})[part.expert or 0] = part
            continue
        layers[name] = _single(name, tensor)
    for base, projections in experts.items():
        layers.update({layer.name: layer for layer in _experts(base, projections, tensors)})
    routers = set(find_routers(layers.values(), tensors))
    return in_order([with_role(x, Role.ROUTER) if x.name in routers else x for x in layers.values()], tensors)


def with_role(layer: Layer, role: Role) -> Layer:
    """The layer in another role; it is left alone as that one is by default."""
    skip = layer.skip_reason
    return replace(
        layer,
        role=role,
        skip_reason=skipped_by_default(role) if skip is None or skip.code is SkipCode.ROLE else skip,
    )


def in_order(layers: Iterable[Layer], tensors: Iterable[str]) -> list[Layer]:
    """Layers in the order of their first tensors."""
    order = {name: i for i, name in enumerate(tensors)}
    return sorted(
        layers, key=lambda x: min((order[p.tensor] for ps in x.parts.values() for p in ps), default=0)
    )


def _split(name: str, tensor: TensorLike, transposed: bool = False) -> Iterable[tuple[str, Part]]:
    """The projections of each expert in a fused 3-D weight ``[experts, out_features, in_features]``, or with
    the last two swapped.
    """
    half = tensor.shape[2 if transposed else 1] // 2
    for e in range(tensor.shape[0]):
        part = Part(name, e, transposed=transposed)
        if name.endswith("down_proj"):
            yield "down_proj", part
        else:
            yield "gate_proj", part._replace(start=0, stop=half)
            yield "up_proj", part._replace(start=half, stop=2 * half)


def _single(name: str, tensor: TensorLike) -> Layer:
    module, _, leaf = name.rpartition(".")
    parts = {leaf: (Part(name),)}
    if leaf == "weight" and len(tensor.shape) == 2:
        n, k = tensor.shape
        role = role_of(module, n, k)
        skip = _unusable(tensor.dtype, n * k) or skipped_by_default(role)
        return Layer(
            module, "linear", ((leaf, n, k),), tensor.dtype, parts=parts, role=role, skip_reason=skip
        )
    rows, columns, role, skip = 1, math.prod(tensor.shape), Role.OTHER, _NOT_A_MATRIX
    if sum(size > 1 for size in tensor.shape) > 1:
        columns = next(size for size in reversed(tensor.shape) if size > 1)
        rows, skip = math.prod(tensor.shape) // columns, _OTHER_PARAMETER
    if leaf == "weight" and len(tensor.shape) in _CONVOLUTION:
        role, skip = Role.CONVOLUTION, CONVOLUTION
    elif "experts" in name.split("."):
        role = Role.EXPERTS
    weights = ((leaf, rows, columns),)
    return Layer(name, "other", weights, tensor.dtype, parts=parts, role=role, skip_reason=skip)


def _unusable(dtype: torch.dtype, elements: int) -> SkipReason | None:
    """Why no weight of this dtype and size is quantized, or None."""
    if dtype not in FLOATS:
        return SkipReason(SkipCode.STORED_DTYPE, f"stored as {dtype}")
    return None if elements else SkipReason(SkipCode.ZERO_SIZE, "zero-size weight")


def _experts(
    base: str, projections: dict[str, dict[int, Part]], tensors: Mapping[str, TensorLike]
) -> Iterable[Layer]:
    """One MoE layer, or single layers when the experts are not uniform gate, up and down projections."""
    used = {p.tensor: p for parts in projections.values() for p in parts.values()}
    dtypes = {tensors[name].dtype for name in used}
    weights = _uniform(projections, tensors)
    if not weights and all(part.expert is not None for part in used.values()):
        projections = {}
        for name in used:
            for projection, part in _split(name, tensors[name], transposed=True):
                projections.setdefault(projection, {})[part.expert or 0] = part
        weights = _uniform(projections, tensors)
    if weights and len(dtypes) == 1:
        count, dtype = len(projections["gate_proj"]), dtypes.pop()
        parts = {p: tuple(projections[p][e] for e in range(count)) for p in PROJECTIONS}
        skip = _unusable(dtype, min(n * k for _, n, k in weights))
        yield Layer(base, "moe", weights, dtype, count, parts, Role.EXPERTS, skip)
        return
    for name, part in used.items():
        single = _single(name, tensors[name])
        yield single if part.expert is None else replace(single, role=Role.EXPERTS, skip_reason=_UNEVEN)


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
    whole = fused.expert is None or tensors[fused.tensor].shape[2 if fused.transposed else 1] == 2 * gate[0]
    if gate != up or down != gate[::-1] or not whole:
        return None
    return tuple((p, *shape) for p, shape in zip(PROJECTIONS, (gate, up, down), strict=True))


def _shape(part: Part, tensors: Mapping[str, TensorLike]) -> tuple[int, int]:
    rows, columns = tensors[part.tensor].shape[-2:]
    if part.transposed:
        rows, columns = columns, rows
    return (rows if part.start is None or part.stop is None else part.stop - part.start), columns


def uneven(layers: Iterable[Layer]) -> dict[str, str]:
    """Why experts that were found one by one are no MoE layer: what is absent or has another shape, by their
    common name.
    """
    by_experts: dict[str, dict[str, dict[int, tuple[int, int]]]] = {}
    for layer in layers:
        if (
            layer.kind == "linear"
            and (match := _EXPERT.match(f"{layer.name}.weight"))
            and match[3] in _PROJECTION
        ):
            by_experts.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = layer.weights[0][1:]
    out = {}
    for base, projections in by_experts.items():
        last = max(e for shapes in projections.values() for e in shapes)
        for projection, shapes in projections.items():
            usual = Counter(shapes.values()).most_common(1)[0][0]
            wrong = [e for e in range(last + 1) if shapes.get(e) != usual]
            if wrong and base not in out:
                has = list(shapes[wrong[0]]) if wrong[0] in shapes else "absent"
                out[base] = f"{base}.{wrong[0]}.{projection} is {has}, where most are {list(usual)}"
        out.setdefault(base, f"{base} has only {', '.join(projections)}, or stores them in several dtypes")
    return out
