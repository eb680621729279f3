"""One rank's share of a model: which rows or columns of each weight it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantport.checkpoint import QuantizedWeight
from quantport.errors import ConfigError, UnsupportedError
from quantport.loading.ranks import Ranks
from quantport.loading.weight_tasks import weight_name
from quantport.model.fused_projections import split_projections
from quantport.model.layers import Layer
from quantport.model.roles import Role
from quantport.numerics.shard_steps import SharedMaxima
from quantport.numerics.sharding import shard_dims, spans_shards, why_not_split
from quantport.planning.plan import Plan
from quantport.planning.steps import Step
from quantport.scheme import Quant, Scheme
from quantport.scheme.catalog import Schemes

_OWN_SCALES = "each rank scales its part of the activations by itself"


@dataclass(frozen=True)
class Shards:
    """How the layers of a model are split over ranks.

    Attributes:
        ranks: The ranks.
        dims: Path of a module -> the dimension of its weight ``[out, in]`` that is split: 0 or 1. Experts are
            split between their products, whatever it says: the outputs of gate and up, the inputs of down. A
            module without an entry is held whole by every rank.
    """

    ranks: Ranks
    dims: Mapping[str, int]


class CutLayers:
    """Layers, and what this rank holds of each.

    Args:
        shards: How they are split.
        layers: Of the whole model.
        path_of: Path of the module of a layer.

    Attributes:
        layers: What this rank holds.
        ranks: The ranks.
    """

    def __init__(self, shards: Shards, layers: Iterable[Layer], path_of: Callable[[Layer], str]) -> None:
        self.ranks, self._dims, self._path_of = shards.ranks, shards.dims, path_of
        self._whole = {layer.name: layer for layer in layers}
        self.layers = [self._cut(layer) for layer in self._whole.values()]

    def _dim(self, layer: Layer, weight: str) -> int | None:
        """The dimension along which a weight of a layer is split; None where it is whole."""
        dim = self._dims.get(self._path_of(layer)) if layer.kind != "other" else None
        return dim if dim is None or not layer.experts else int(weight.endswith("down_proj"))

    def _cut(self, layer: Layer) -> Layer:
        weights, parts = [], dict(layer.parts)
        for name, n, k in layer.weights:
            dim = self._dim(layer, name)
            if dim is None:
                return layer
            first, last = self.ranks.shares(k if dim else n)[self.ranks.rank]
            weights.append((name, n, last - first) if dim else (name, last - first, k))
            parts[name] = tuple(
                part._replace(columns=(first, last)) if dim else part.rows(first, last)
                for part in layer.parts[name]
            )
        own = replace(layer, weights=tuple(weights), parts=parts, cuts=())
        if layer.stored_bytes is None:
            return own
        return replace(own, stored_bytes=layer.stored_bytes * own.elements // layer.elements)

    def checked(self, plan: Plan, schemes: Schemes) -> Plan:
        """A plan of ``layers``, with notes on what a rank computes otherwise than one process does.

        Raises:
            ConfigError: a scheme cannot be split so, on whichever rank.
            UnsupportedError: a quantized embedding would be split.
        """
        steps = tuple(self._checked(step, schemes) for step in plan.steps)
        shard = (self.ranks.rank, self.ranks.count) if self._dims else None
        return replace(plan, steps=steps, shard=shard)

    def told(self, plan: Plan) -> str:
        """What of a plan must be the same on all ranks: schemes, and how whole weights are split."""
        lines = (
            f"{step.layer.name} {step.scheme} {step.stored} {name} {n} {k} {self._dim(whole, name)}"
            for step in plan.steps
            for whole in (self._whole[step.layer.home],)
            for name, n, k in whole.weights
        )
        return "\n".join(lines)

    def times_read(self, layer: Layer) -> int:
        """How often as much is read of a weight of a layer as is held: columns are cut out of whole rows."""
        whole = self._whole[layer.home]
        return self.ranks.count if 1 in {self._dim(whole, name) for name, _, _ in whole.weights} else 1

    def _checked(self, step: Step, schemes: Schemes) -> Step:
        whole = self._whole[step.layer.home]
        dims = {name: self._dim(whole, name) for name, _, _ in whole.weights}
        if not step.choice or None in dims.values():
            return step
        scheme = schemes[step.scheme]
        asked = f"split {whole.name} in {scheme.name} over {self.ranks.count} ranks"
        if whole.role is Role.EMBEDDING:
            raise UnsupportedError(asked, "each looks up rows that others hold", "leave it in 16 bits")
        each = whole if step.stored else split_projections(whole, scheme)[0]
        if not whole.experts and (len(dims) > 1 or each is not whole):
            names = ", ".join(dims if len(dims) > 1 else dict(whole.cuts))
            found = f"scales of its own for each of {names}, which lie in one weight"
            raise ConfigError(asked, found, "a scheme with scales for rows or groups")
        for name, n, k in whole.weights:
            self._check(asked, scheme, dims[name] or 0, k if dims[name] else n, step.stored)
        note = _OWN_SCALES if 1 in dims.values() and _spans(scheme.activation) else ""
        return replace(step, note="; ".join(filter(None, (step.note, note))))

    def _check(self, asked: str, scheme: Scheme, dim: int, size: int, stored: bool) -> None:
        asked = f"{asked}, along its {('outputs', 'inputs')[dim]}"
        if scheme.solver is not None and not stored:
            found = f"solver {scheme.solver.name!r}, which may look at all of a weight"
            raise ConfigError(asked, found, scheme.unsolved.name)
        for first, last in self.ranks.shares(size):
            if first == last:
                raise ConfigError(asked, f"{size} of them: none for the last rank", "fewer ranks")
            is_whole = last == size and not (dim and scheme.rotation)
            if why := why_not_split(scheme, dim, last - first, is_whole=is_whole, is_stored=stored):
                raise ConfigError(asked, *why)

    def maxima(self, step: Step, scheme: Scheme, nonfinite: str) -> dict[str, SharedMaxima]:
        """What the ranks have to agree on before a layer can be quantized, by the name of the weight."""
        dims = {name: self._dim(self._whole[step.layer.home], name) for name, _, _ in step.layer.each}
        return {
            name: SharedMaxima(scheme, dim, (n, k), weight_name(step.layer, name), nonfinite)
            for name, n, k in step.layer.each
            if (dim := dims[name]) is not None and spans_shards(scheme, dim)
        }

    def stored(self, layer: Layer, weights: Mapping[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
        """What this rank holds of weights that are quantized already."""
        whole, out = self._whole[layer.home], dict(weights)
        for name, n, k in whole.each:
            dim = self._dim(whole, name)
            if dim is not None:
                size = k if dim else n
                first, last = self.ranks.shares(size)[self.ranks.rank]
                read = _rows_of if dim == 0 else _columns_of
                weight = out[name]
                nbytes = None if weight.size is None else weight.size * (last - first) // size
                out[name] = replace(weight, read=read(weight, first, last), keys={}, size=nbytes)
        return out


def agree_on(maxima: Iterable[SharedMaxima], find_next: Callable[[], None], ranks: Ranks, asked: str) -> None:
    """Lets the ranks agree on everything that their scales follow from, in as few reductions as may be.

    Args:
        maxima: Of all weights, in the same order on every rank.
        find_next: Calls `SharedMaxima.find_next` of all that are not complete.
        ranks: The ranks.
        asked: What is done, for errors.

    Raises:
        RankError: another rank has failed, or is gone; here whatever ``find_next`` raises.
    """
    every = list(maxima)
    while pending := [shared for shared in every if not shared.complete]:
        with ranks.together(asked):
            find_next()
            found = [shared.found for shared in pending if shared.found is not None]
            largest = torch.cat([own.flatten().cpu() for own in found])
        agreed = ranks.maximum(largest, asked)
        parts = agreed.split([own.numel() for own in found])
        for shared, own, part in zip(pending, found, parts, strict=True):
            shared.agree(part.view_as(own).to(own.device))


def _spans(activation: Quant | None) -> bool:
    """Whether activations have a scale that belongs to all columns and is found while the model runs."""
    if activation is None or activation.static:
        return False
    outer = activation.outer_block
    return not activation.group_size or (outer is not None and not outer[1])


def _rows_of(weight: QuantizedWeight, first: int, last: int) -> Callable[[slice], dict[str, Tensor]]:
    return lambda rows: weight.read(slice(first + rows.start, first + rows.stop))


def _columns_of(weight: QuantizedWeight, first: int, last: int) -> Callable[[slice], dict[str, Tensor]]:
    dims = shard_dims(weight.scheme, 1)

    def read(rows: slice) -> dict[str, Tensor]:
        before, until = (weight.scheme.layout(rows.stop - rows.start, columns) for columns in (first, last))
        return {
            key: tensor
            if (d := dims[key]) is None
            else _narrow(tensor, d, before[key][0][d], until[key][0][d])
            for key, tensor in weight.read(rows).items()
        }

    return read


def _narrow(tensor: Tensor, dim: int, start: int, stop: int) -> Tensor:
    return tensor.narrow(dim, start, stop - start).contiguous()
