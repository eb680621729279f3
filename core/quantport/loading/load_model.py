"""``load``: a checkpoint, quantized while it streams in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from quantport.checkpoint import Recognized, unchanged
from quantport.device import Device
from quantport.errors import BudgetError, CheckpointError, DeviceError
from quantport.kvcache import kv_shape
from quantport.loading.build_context import as_usual, collecting_later
from quantport.loading.executor import Progress, run_tasks
from quantport.loading.fill_model import ModelFiller, module_path
from quantport.loading.kv_caches import DefaultCache, default_cache
from quantport.loading.locate import Source, named, open_checkpoint
from quantport.loading.mark_configs import mark_configs
from quantport.loading.place_tensors import HeldDtypes, main_dtype, place_tensors
from quantport.loading.plan_model import merge, refuse_nothing, warn
from quantport.loading.renamed import renamed
from quantport.loading.settle_ties import settle_ties, tie_again, tied_groups
from quantport.loading.skeleton import Factory, build
from quantport.loading.stored_config import stored_schemes, with_stored
from quantport.loading.swap_modules import match_modules
from quantport.model.layers import Layer
from quantport.model.roles import SkipCode
from quantport.model.stored_experts import find_renamed_experts
from quantport.planning.fit import advice, shortage
from quantport.planning.plan import Plan, make_plan
from quantport.plugins.registry import Registry, default_registry


@renamed("rows", "num_tokens")
def load(
    path_or_id: Source,
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
) -> Any:
    """Loads a checkpoint and quantizes it while it streams in: never is the 16-bit model in memory.

    Args:
        path_or_id: Checkpoint directory, safetensors file, or a model id of the hub; or a `TensorSource`.
        scheme: Scheme name; None uses the configuration, or lets the device choose and say why.
        config: A ``QuantConfig`` or what it parses.
        device: ``auto`` takes the best device found.
        model: Makes the module; by default Transformers builds it from ``config.json``.
        dtype: Dtype of what stays in 16 bits; by default that of the checkpoint, or what the device
            computes in.
        num_tokens: Expected tokens at a time (rows of the activations), for choosing kernels.
        fallback: Overrides ``config.fallback``.
        progress: Called with (bytes done, bytes in total, name of the tensor); before the first tensor with
            0 bytes done and what is done instead.
        workers: Tensors that are quantized at a time; the number of cores by default.
        budget: Memory that streaming may take beside the loaded model, in bytes or as ``"512MB"``; by default
            512 MiB, or what the largest weight needs.
        registry: Where backends, schemes and formats come from; by default that of the process.

    Returns:
        The model, in eval mode on the device, with the plan as ``model.quantport_plan``.

    Raises:
        QuantportError: with what was asked, what was found, and what would work. No model is left half
            loaded.
    """
    with prepared(
        path_or_id,
        scheme,
        config=config,
        device=device,
        model=model,
        dtype=dtype,
        num_tokens=num_tokens,
        fallback=fallback,
        budget=budget,
        registry=registry,
        progress=progress,
    ) as made:
        fits(made.plan, f"load {made.plan.source} on {made.plan.device}")
        warn(made.plan.warnings)
        with collecting_later():
            tasks = made.filler.tasks()
        with unchanged(made.filler.source):
            run_tasks(tasks, progress, workers, made.plan.budget)
        tie_again(made.model, made.groups)
        decided = made.filler.with_warnings()
        _finish(made.model, decided)
        warn(decided.warnings[len(made.plan.warnings) :])
        if made.cache:
            made.cache.install()
        mark_configs(made.model)
    return made.model


@dataclass(frozen=True)
class Prepared:
    """A model on meta, what fills it, and the names of each parameter that has several."""

    model: nn.Module
    plan: Plan
    filler: ModelFiller
    cache: DefaultCache | None
    groups: list[tuple[str, ...]]


@contextmanager
def prepared(
    path_or_id: Source,
    scheme: str | None,
    *,
    config: Any = None,
    device: str | torch.device | Device = "auto",
    model: Factory | None = None,
    dtype: torch.dtype | None = None,
    num_tokens: int = 1,
    fallback: str | None = None,
    budget: int | str | None = None,
    registry: Registry | None = None,
    progress: Progress | None = None,
) -> Iterator[Prepared]:
    """Opens a checkpoint for as long as the block lasts, builds its model on meta, and plans; arguments as
    for `load`.
    """
    registry = registry or default_registry()
    target = registry.with_memory_now(_usable(registry.device(device)))
    parsed = merge(scheme, config, {"fallback": fallback}, registry.schemes)
    with as_usual(), open_checkpoint(path_or_id, registry) as (checkpoint, described):
        total = sum(info.nbytes for info in checkpoint.source.tensors.values())

        def say(what: str) -> None:
            if progress:
                progress(0, total, what)

        say("reading headers")
        with collecting_later():
            layers = checkpoint.layers()
            quantized = checkpoint.quantized()
            if checkpoint.converts or quantized:
                parsed = with_stored(checkpoint, parsed, registry.schemes)
            compute, source = dtype or main_dtype(layers, described, target), checkpoint.source
            built, names = build(source.directory, model, compute, source.tensors, say, checkpoint.config())
            if model is None:
                built.name_or_path = str(checkpoint.home)  # type: ignore[assignment]  # as Transformers has it
            say("choosing kernels")
            layers = find_renamed_experts(layers, names, source.tensors)
            dtypes = HeldDtypes(built, compute, factory=model is not None)
            ties = settle_ties(built, checkpoint, layers, names, dtypes)
            as_it_is = () if checkpoint.converts else quantized
            layers = place_tensors(layers, built, names, dtypes, ties.copies, as_it_is)
            layers = match_modules(layers, built, partial(module_path, names))
            _homeless(built, layers, named(path_or_id))
            _placed(layers, checkpoint)
            cache = default_cache(built, parsed.kv_cache_dtype, parsed.kv_cache_skip_layers, registry)
            decided = make_plan(
                layers,
                parsed,
                target,
                registry.kernels(target.kind),
                registry.schemes,
                source=named(path_or_id),
                num_tokens=num_tokens,
                dtype=compute,
                kv=kv_shape(described),
                budget=budget,
                warnings=(*checkpoint.notices(), *ties.warnings),
                stored=stored_schemes(checkpoint, layers),
                format_name=checkpoint.format_name,
            )
            refuse_nothing(decided)
            groups = tied_groups(built)
            filler = ModelFiller(checkpoint, built, decided, names, dtypes, registry)
        yield Prepared(built, decided, filler, cache, groups)


def _usable(target: Device) -> Device:
    """Checks that one can load to a device."""
    if target.simulated:
        suggestion = (
            "a device that `quantport devices` lists; quantport.plan works for devices that are not here"
        )
        raise DeviceError(f"load to {target}", "it is simulated: nothing runs on it", suggestion)
    return target


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


def _finish(model: nn.Module, decided: Plan) -> None:
    """Ties weights, moves buffers, and checks that nothing is missing."""
    tie_weights(model)
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise CheckpointError(
            f"load {decided.source}",
            f"the model needs {len(missing)} tensors that it does not hold: {', '.join(missing[:5])}",
            "the complete checkpoint, or the model class that it was saved from",
        )
    model.requires_grad_(False)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != decided.device.torch_device:
                module._buffers[name] = buffer.to(decided.device.torch_device)
    model.quantport_plan = decided  # type: ignore[assignment]  # a note on the model, not a submodule


def tie_weights(model: nn.Module) -> None:
    """Ties the weights of a model as its class does."""
    tie: Any = getattr(model, "tie_weights", None)
    if hasattr(model, "all_tied_weights_keys"):  # Transformers: as settled, not as configured
        tie(recompute_mapping=False)
    elif callable(tie):
        tie()


def fits(decided: Plan, asked: str, peak: int | None = None) -> None:
    """Refuses what needs more memory than is free.

    Raises:
        BudgetError: says how much.
    """
    if found := shortage(decided, peak):
        raise BudgetError(asked, found, advice(decided))
