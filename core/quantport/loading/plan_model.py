"""``plan``: what loading would do, from headers alone."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from quantport.checkpoint import Recognized
from quantport.config import QuantConfig
from quantport.config.resolve import StoredSchemes
from quantport.device import Device
from quantport.errors import CheckpointError, ConfigError
from quantport.kvcache import kv_shape
from quantport.loading.build_context import as_usual
from quantport.loading.executor import Progress
from quantport.loading.fill_model import module_path
from quantport.loading.locate import Source, named, open_checkpoint
from quantport.loading.place_tensors import HeldDtypes, leave_in_fp32, main_dtype, place_tensors
from quantport.loading.renamed import renamed
from quantport.loading.skeleton import Factory, build
from quantport.loading.stored_config import stored_schemes, with_stored
from quantport.loading.swap_modules import match_modules
from quantport.model.beyond_config import beyond_config
from quantport.model.fused_projections import with_cuts
from quantport.model.layers import Layer, find_layers
from quantport.model.stored_experts import find_renamed_experts
from quantport.model.tied_weights import from_config, own_parameters, said_ties, undecided_tie, untie
from quantport.planning.plan import Plan, make_plan
from quantport.plugins.registry import Registry, default_registry
from quantport.scheme.catalog import Schemes


def merge(scheme: str | None, config: Any, options: Mapping[str, Any], schemes: Schemes) -> QuantConfig:
    """Merges the arguments into one checked configuration; two different schemes are a conflict."""
    parsed = QuantConfig.parse(config, schemes)
    overrides = {k: v for k, v in options.items() if v is not None}
    if scheme is not None:
        asked: str | None = schemes[scheme].name
        if parsed.group_size and schemes[scheme].weight.format == "int4":
            asked = QuantConfig.parse({"scheme": asked, "group_size": parsed.group_size}, schemes).scheme
        if parsed.scheme not in (None, asked):
            raise ConfigError(
                f"scheme={scheme!r}", f"config says scheme={parsed.scheme!r}", "give one of them"
            )
        overrides["scheme"] = asked
    return (
        QuantConfig.parse({**parsed.model_dump(exclude_unset=True), **overrides}, schemes)
        if overrides
        else parsed
    )


@renamed("rows", "num_tokens")
@renamed("model", "path_or_id")  # of load, whose arguments these are now, it is another one
def plan(
    path_or_id: Source | nn.Module,
    scheme: str | None = None,
    *,
    config: Any = None,
    device: str | torch.device | Device = "auto",
    model: Factory | None = None,
    dtype: torch.dtype | None = None,
    num_tokens: int = 1,
    fallback: str | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
    budget: int | str | None = None,
    registry: Registry | None = None,
) -> Plan:
    """Says what ``load`` or ``quantize_`` would do, and why, for a device that need not be here. Reads
    headers only.

    Args:
        path_or_id: As for ``load`` (the data may be missing), or a module in memory.
        scheme: Scheme name; None uses the configuration, or lets the device choose.
        config: A ``QuantConfig`` or what it parses.
        device: Found (``auto``, ``kind``, ``kind:0``) or simulated (``kind:arch``).
        model: As for ``load``: makes the module, without which a plan knows the names of layers only.
        dtype: Activation dtype; by default that of the weights, or what the device computes in.
        num_tokens: As for ``load``.
        fallback: As for ``load``.
        progress: Taken so that every argument of ``load`` is; a plan is made at once.
        workers: As ``progress``.
        budget: As for ``load``.
        registry: As for ``load``.

    Returns:
        The plan.
    """
    registry = registry or default_registry()
    target = registry.with_memory_now(registry.device(device))
    parsed = merge(scheme, config, {"fallback": fallback}, registry.schemes)
    stored: StoredSchemes = {}
    format_name = ""
    if isinstance(path_or_id, nn.Module):
        config_of: Any = getattr(path_or_id, "config", None)
        described = config_of.to_dict() if hasattr(config_of, "to_dict") else {}
        layers, source = _layers_of(path_or_id, described, target, dtype), type(path_or_id).__name__
        open_questions: tuple[str, ...] = ()
    else:
        with as_usual(), open_checkpoint(path_or_id, registry, headers_only=True) as (checkpoint, described):
            layers, open_questions = _layers_in(checkpoint, described, target, dtype, model)
            source, format_name = named(path_or_id), checkpoint.format_name
            if checkpoint.converts or checkpoint.quantized():
                parsed = with_stored(checkpoint, parsed, registry.schemes)
                stored = stored_schemes(checkpoint, layers)
                open_questions = (*checkpoint.notices(), *open_questions)
    kv = kv_shape(described)
    kernels, schemes = registry.kernels(target.kind), registry.schemes
    return make_plan(
        layers,
        parsed,
        target,
        kernels,
        schemes,
        source=source,
        num_tokens=num_tokens,
        dtype=dtype,
        kv=kv,
        budget=budget,
        warnings=open_questions,
        stored=stored,
        format_name=format_name,
    )


def _layers_of(
    model: nn.Module, config: Mapping[str, Any], target: Device, dtype: torch.dtype | None
) -> list[Layer]:
    """The layers of a module."""
    buffers = {
        f"{path}.{name}".lstrip("."): buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    stored = (layer for layer in find_layers(buffers) if layer.kind == "other")
    layers = [*find_layers(own_parameters(model)), *stored]
    dtypes = HeldDtypes(model, dtype or main_dtype(layers, config, target))
    left = [leave_in_fp32(layer, model, f"{layer.name}.weight", dtypes) for layer in layers]
    return match_modules(left, model, partial(module_path, {}))


def _layers_in(
    checkpoint: Recognized,
    config: Mapping[str, Any],
    target: Device,
    dtype: torch.dtype | None,
    factory: Factory | None,
) -> tuple[list[Layer], tuple[str, ...]]:
    """The layers of a checkpoint as the model has them, and what is open; where Transformers cannot build the
    model, as names, shapes and ``config.json`` say.
    """
    layers = checkpoint.layers()
    directory, tensors = checkpoint.source.directory, checkpoint.source.tensors
    held = dtype or main_dtype(layers, config, target)
    try:
        model, names = build(directory, factory, held, tensors, config=checkpoint.config())
    except CheckpointError as error:
        if factory is not None:
            raise
        layers, undecided = from_config(layers, config)
        if config:  # which ``load`` would build the model from
            undecided += (f"planned by names and shapes alone: {error.found}",)
        wide = [replace(x, held_dtype=held) if x.dtype is torch.float64 else x for x in layers]
        return [with_cuts(layer, config) for layer in beyond_config(wide, config)], undecided
    both = _stored_ties(said_ties(model), set(names.values()))
    for tied in both:
        untie(model, tied)
    undecided = tuple(undecided_tie(*pair) for pair in both.items())
    layers = find_renamed_experts(layers, names, tensors)
    dtypes = HeldDtypes(model, held, factory=factory is not None)
    as_it_is = () if checkpoint.converts else checkpoint.quantized()
    placed = place_tensors(layers, model, names, dtypes, copies={}, quantized=as_it_is)
    return match_modules(placed, model, partial(module_path, names)), undecided


def _stored_ties(said: Mapping[str, str], stored: Container[str]) -> dict[str, str]:
    """The parameters that a model ties to another one, or with another one to a third, where a checkpoint
    stores both.
    """
    first: dict[str, str] = {}
    kept = {a: first.setdefault(b, b if b in stored else a) for a, b in said.items() if a in stored}
    return {a: b for a, b in kept.items() if a != b}


def warn(texts: Iterable[str]) -> None:
    """Warns the caller of ``load`` or ``quantize_`` of what who never looks at the plan has to know."""
    for text in texts:
        warnings.warn(text, UserWarning, stacklevel=4)


def refuse_nothing(decided: Plan) -> None:
    """Refuses to carry out a plan that quantizes nothing, unless the configuration says so.

    Raises:
        ConfigError: names why the layers stay.
    """
    configured = any(s.skip_reason and s.skip_reason.configured for s in decided.steps)
    if configured or any(s.requested_scheme for s in decided.steps):
        return
    notes = dict.fromkeys(s.note for s in decided.steps if s.layer.kind != "other")
    found = "no layer can be quantized" + (
        f": {'; '.join(notes)}" if notes else ": it has no linear layers and no experts"
    )
    raise ConfigError(
        f"quantize {decided.source}", found, "a 16-bit model with torch.nn.Linear layers or experts"
    )
