"""Plans a checkpoint into a model that was built on meta: what ``load`` does before it reads a weight, and
integrations do with models that others build.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from quantport.checkpoint import Recognized
from quantport.config import QuantConfig
from quantport.device import Device
from quantport.errors import CheckpointError
from quantport.kvcache import kv_shape
from quantport.loading.fill_model import ModelFiller, module_path
from quantport.loading.kv_caches import DefaultCache, default_cache
from quantport.loading.place_tensors import HeldDtypes, place_tensors
from quantport.loading.plan_model import refuse_nothing
from quantport.loading.settle_ties import settle_ties, tied_groups
from quantport.loading.shards import CutLayers, Shards
from quantport.loading.stored_config import stored_schemes, with_stored
from quantport.loading.swap_modules import match_modules
from quantport.model.layers import Layer
from quantport.model.roles import SkipCode
from quantport.model.stored_experts import find_renamed_experts
from quantport.planning.plan import Plan, make_plan
from quantport.plugins.registry import Registry
from quantport.scheme.catalog import Schemes


@dataclass(frozen=True)
class Prepared:
    """A model on meta, what fills it, and the names of each parameter that has several."""

    model: nn.Module
    plan: Plan
    filler: ModelFiller
    cache: DefaultCache | None
    groups: list[tuple[str, ...]]


def read_layers(
    checkpoint: Recognized, requested: QuantConfig, schemes: Schemes
) -> tuple[list[Layer], QuantConfig]:
    """The layers of a checkpoint, and what is asked of them: of a quantized one nothing that nobody asked
    for.
    """
    layers = checkpoint.layers()
    if checkpoint.converts or checkpoint.quantized():
        requested = with_stored(checkpoint, requested, schemes)
    return layers, requested


def prepare(
    checkpoint: Recognized,
    described: Mapping[str, Any],
    layers: Sequence[Layer],
    model: nn.Module,
    names: Mapping[str, str],
    dtypes: HeldDtypes,
    config: QuantConfig,
    device: Device,
    registry: Registry,
    *,
    source: str,
    num_tokens: int = 1,
    budget: int | str | None = None,
    shards: Shards | None = None,
) -> Prepared:
    """Plans what each layer becomes.

    Args:
        checkpoint: What is read.
        described: Its ``config.json``.
        layers: From `read_layers`.
        model: On meta.
        names: For each tensor of the checkpoint its name in the model.
        dtypes: In which dtype the model holds what stays.
        config: From `read_layers`.
        device: Which the kernels are for.
        registry: As for ``load``.
        source: What the plan calls the checkpoint.
        num_tokens: As for ``load``.
        budget: As for ``load``.
        shards: What this rank holds of each layer; None for all of it.

    Raises:
        QuantportError: as ``load``.
    """
    layers = find_renamed_experts(layers, names, checkpoint.source.tensors)
    ties = settle_ties(model, checkpoint, layers, names, dtypes)
    as_it_is = () if checkpoint.converts else checkpoint.quantized()
    layers = place_tensors(layers, model, names, dtypes, ties.copies, as_it_is)
    path_of = partial(module_path, names)
    layers = match_modules(layers, model, path_of)
    _homeless(model, layers, source)
    _placed(layers, checkpoint)
    cut = CutLayers(shards, layers, path_of) if shards else None
    cache = default_cache(model, config.kv_cache_dtype, config.kv_cache_skip_layers, registry)
    decided = make_plan(
        cut.layers if cut else layers,
        config,
        device,
        registry.kernels(device.kind),
        registry.schemes,
        source=source,
        num_tokens=num_tokens,
        dtype=dtypes.dtype,
        kv=kv_shape(described),
        budget=budget,
        warnings=(*checkpoint.notices(), *ties.warnings),
        stored=stored_schemes(checkpoint, layers),
        format_name=checkpoint.format_name,
    )
    refuse_nothing(decided)
    if cut:
        decided = cut.checked(decided, registry.schemes)
    groups = tied_groups(model)
    filler = ModelFiller(checkpoint, model, decided, names, dtypes, registry, cut)
    return Prepared(model, decided, filler, cache, groups)


def _homeless(model: nn.Module, layers: Sequence[Layer], source: object) -> None:
    """Refuses a model that has a module for none of the layers; single layers without one are named in the
    plan.
    """
    usable = any(layer.kind != "other" and not layer.skip_reason for layer in layers)
    lost = [layer.name for layer in layers if layer.skipped_as(SkipCode.NO_MODULE)]
    if lost and not usable:
        found = (
            f"no module for any layer ({lost[0]}, ...); it has: "
            f"{', '.join(n for n, _ in list(model.named_modules())[1:6])}"
        )
        raise CheckpointError(
            f"load {source} into {type(model).__name__}", found, "the model that the checkpoint was made from"
        )


def _placed(layers: Iterable[Layer], checkpoint: Recognized) -> None:
    """Refuses a quantized checkpoint whose quantized layers the model does not have, and that cannot be
    decoded.
    """
    quantized = {} if checkpoint.converts else checkpoint.quantized()
    for layer in layers:
        if layer.name in quantized and layer.skip_reason and not layer.opt_in:
            raise CheckpointError(
                f"load the quantized layer {layer.name}",
                str(layer.skip_reason),
                "the model that the checkpoint was saved from",
            )
