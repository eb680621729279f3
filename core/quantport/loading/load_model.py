"""``load``: a checkpoint, quantized while it streams in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quantport.checkpoint import unchanged
from quantport.device import Device
from quantport.errors import BudgetError, CheckpointError, DeviceError
from quantport.loading.build_context import as_usual, collecting_later
from quantport.loading.executor import Progress, run_tasks
from quantport.loading.locate import Source, named, open_checkpoint
from quantport.loading.mark_configs import mark_configs
from quantport.loading.place_tensors import HeldDtypes, main_dtype
from quantport.loading.plan_model import merge, warn
from quantport.loading.prepare import Prepared, prepare, read_layers
from quantport.loading.renamed import renamed
from quantport.loading.settle_ties import tie_again
from quantport.loading.skeleton import Factory, build
from quantport.planning.fit import advice, shortage
from quantport.planning.plan import Plan
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
    target = registry.with_memory_now(usable(registry.device(device)))
    parsed = merge(scheme, config, {"fallback": fallback}, registry.schemes)
    with as_usual(), open_checkpoint(path_or_id, registry) as (checkpoint, described):
        total = sum(info.nbytes for info in checkpoint.source.tensors.values())

        def say(what: str) -> None:
            if progress:
                progress(0, total, what)

        say("reading headers")
        with collecting_later():
            layers, parsed = read_layers(checkpoint, parsed, registry.schemes)
            compute, source = dtype or main_dtype(layers, described, target), checkpoint.source
            built, names = build(source.directory, model, compute, source.tensors, say, checkpoint.config())
            if model is None:
                built.name_or_path = str(checkpoint.home)  # type: ignore[assignment]  # as Transformers has it
            say("choosing kernels")
            made = prepare(
                checkpoint,
                described,
                layers,
                built,
                names,
                HeldDtypes(built, compute, factory=model is not None),
                parsed,
                target,
                registry,
                source=named(path_or_id),
                num_tokens=num_tokens,
                budget=budget,
            )
        yield made


def usable(target: Device) -> Device:
    """Checks that one can load to a device."""
    if target.simulated:
        suggestion = (
            "a device that `quantport devices` lists; quantport.plan works for devices that are not here"
        )
        raise DeviceError(f"load to {target}", "it is simulated: nothing runs on it", suggestion)
    return target


def _finish(model: nn.Module, decided: Plan) -> None:
    """Ties weights, moves buffers, and checks that nothing is missing."""
    tie_weights(model)
    modules = list(model.modules())
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    if any(p.is_meta for p in parameters):
        missing = [name for name, p in model.named_parameters() if p.is_meta]
        raise CheckpointError(
            f"load {decided.source}",
            f"the model needs {len(missing)} tensors that it does not hold: {', '.join(missing[:5])}",
            "the complete checkpoint, or the model class that it was saved from",
        )
    for parameter in parameters:
        parameter.requires_grad_(False)
    for module in modules:
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
