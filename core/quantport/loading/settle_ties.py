"""Weights that a model ties, and of which a file may hold several: equal bytes are a tie, different ones
never are.

As ``PreTrainedModel.tie_weights`` does while Transformers loads; but no second copy is held meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from quantport.checkpoint import Recognized, TensorSource
from quantport.errors import CheckpointError
from quantport.loading.copy_tensors import SLAB, slabs
from quantport.loading.place_tensors import HeldDtypes
from quantport.model.layers import Layer
from quantport.model.tied_weights import said_ties, untie


class Ties(NamedTuple):
    """What was found out of ties.

    Attributes:
        copies: Stored tensor -> the stored tensor of the same bytes that it is tied to.
        warnings: For people: what is not tied, although the configuration says so.
    """

    copies: dict[str, str]
    warnings: tuple[str, ...]


def settle_ties(
    model: nn.Module,
    checkpoint: Recognized,
    layers: Iterable[Layer],
    names: Mapping[str, str],
    dtypes: HeldDtypes,
) -> Ties:
    """Compares the stored tensors of weights that are tied, and unties those that differ.

    Args:
        model: On meta; its ties become those of the file.
        checkpoint: Its tensors are read where two of them are tied.
        layers: Those of the checkpoint.
        names: For each tensor of the checkpoint its name in the model.
        dtypes: In which tensors are held: what differs only beyond them is equal.

    Raises:
        CheckpointError: tensors differ whose weights the code of the model ties, whatever a file holds.
    """
    source = checkpoint.source
    quantized = checkpoint.quantized()
    codes = {tensor for weights in quantized.values() for w in weights.values() for tensor in w.tensors}
    stored = {names[tensor]: tensor for tensor in source.tensors if tensor not in codes}
    placed = {names[tensor] for tensor in source.tensors}
    together = [{layer.name, *layer.tied} for layer in layers]
    first: dict[str, str] = {}  # weight that others are tied to -> the stored tensor that stands for them all
    copies: dict[str, str] = {}
    untied: list[str] = []

    def equal(a: str, b: str) -> bool:
        dtype_a, dtype_b = (dtypes.of(names[tensor], source.tensors[tensor].dtype) for tensor in (a, b))
        return dtype_a is dtype_b and _equal(source, a, b, dtype_a)

    for target, other in said_ties(model).items():
        ends = {name.removesuffix(".weight") for name in (target, other)}
        has_own = target in placed or not checkpoint.converts
        if ends & set(quantized) and has_own and not any(ends <= tied for tied in together):
            untie(model, target)  # as it was saved
        if target not in stored or ends & set(quantized):
            continue
        kept = first.setdefault(other, stored.get(other, stored[target]))
        if kept == stored[target]:
            continue
        if equal(stored[target], kept):
            copies[stored[target]] = kept
        else:
            untie(model, target)
            if not quantized:  # else as it was saved, and said then
                untied.append(
                    f"{target} is stored with other values than {other}: they are not tied, although "
                    "the configuration says so"
                )
    for group in tied_groups(model):
        held = [stored[name] for name in group if name in stored and stored[name] not in copies]
        for tensor in held[1:]:
            if not equal(tensor, held[0]):
                raise CheckpointError(
                    f"load {tensor} and {held[0]} into {type(model).__name__}",
                    "they differ, and the model has one weight for both",
                    "a model that does not tie them, or a checkpoint with one of them",
                )
            copies[tensor] = held[0]
    return Ties(copies, tuple(untied))


def tied_groups(model: nn.Module) -> list[tuple[str, ...]]:
    """The names of each parameter that has several."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return [tuple(group) for group in by_id.values() if len(group) > 1]


def tie_again(model: nn.Module, groups: Iterable[tuple[str, ...]]) -> None:
    """Gives parameters that were tied before a model was filled the one that was loaded; those that a
    quantized module took with it are gone.
    """
    for group in groups:
        places = [(model.get_submodule(path), leaf) for path, _, leaf in (n.rpartition(".") for n in group)]
        parameters = [module._parameters.get(leaf) for module, leaf in places]
        loaded = next((p for p in parameters if p is not None and not p.is_meta), None)
        for (module, leaf), parameter in zip(places, parameters, strict=True):
            if parameter is not None and loaded is not None:
                module._parameters[leaf] = loaded


def _equal(source: TensorSource, a: str, b: str, dtype: torch.dtype) -> bool:
    """Whether two tensors have the same bits once they are held."""
    info = source.tensors[a]
    if source.tensors[b].shape != info.shape:
        return False
    for rows in slabs(info.shape, info.nbytes, SLAB):
        left, right = (source.read(n, rows).to(dtype).reshape(-1).view(torch.uint8) for n in (a, b))
        equal = torch.equal(left, right)
        for name in (a, b):
            source.release(name, rows)
        if not equal:
            return False
    return True
