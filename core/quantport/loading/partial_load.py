"""The quantized layers of a model that another library builds, and of which it loads all the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from quantport.checkpoint import unchanged
from quantport.device import Device
from quantport.loading.build_context import as_usual, collecting_later
from quantport.loading.destination import IntoModel
from quantport.loading.executor import Progress, Task, run_tasks
from quantport.loading.load_model import fits, usable
from quantport.loading.locate import Source, named, open_checkpoint
from quantport.loading.mark_configs import mark_configs
from quantport.loading.place_tensors import HeldDtypes
from quantport.loading.plan_model import merge, warn
from quantport.loading.prepare import prepare, read_layers
from quantport.loading.shards import Shards, agree_on
from quantport.modules import QuantModule
from quantport.planning.plan import Plan
from quantport.plugins.registry import Registry, default_registry

DeviceOf = Callable[[str], torch.device]
Rename = Callable[[Iterable[str]], Mapping[str, str]]


class PartialLoad:
    """Plans a checkpoint into a model on meta, puts empty quantized modules into it, and fills those later:
    what ``load`` does, but for the tensors that stay as they are stored.

    The files are open until `fill` has returned, or nobody holds this any longer.

    Args:
        source: As for ``load``.
        model: On meta; changed in place.
        rename: For the names of tensors of the checkpoint those in the model.
        config: A ``QuantConfig`` or what it parses.
        dtype: What the model computes in.
        device: Which the kernels are for.
        spread: Several devices share the model: none has to hold all of it.
        shards: What this rank holds of it, where it is split over several; every rank has to make one of
            these, and to fill it.
        registry: As for ``load``.

    Attributes:
        plan: What each layer becomes.
        modules: Path -> quantized module, empty until it is filled.
        sizes: Path -> bytes that the module will hold.
        decoded: Paths of the modules whose weights the checkpoint stores as codes and the model holds in 16
            bits: they have none until `fill` sets them.

    Raises:
        QuantportError: as ``load``.
    """

    def __init__(
        self,
        source: Source,
        model: nn.Module,
        rename: Rename,
        config: Any,
        dtype: torch.dtype,
        device: str | torch.device | Device = "auto",
        *,
        spread: bool = False,
        shards: Shards | None = None,
        registry: Registry | None = None,
    ) -> None:
        registry = registry or default_registry()
        target = registry.with_memory_now(usable(registry.device(device)))
        parsed = merge(None, config, {}, registry.schemes)
        with ExitStack() as stack, as_usual(), collecting_later():
            checkpoint, described = stack.enter_context(open_checkpoint(source, registry))
            layers, parsed = read_layers(checkpoint, parsed, registry.schemes)
            self._made = prepare(
                checkpoint,
                described,
                layers,
                model,
                rename(checkpoint.source.tensors),
                HeldDtypes(model, dtype),
                parsed,
                target,
                registry,
                source=named(source),
                shards=shards,
            )
            self.plan = self._made.plan
            if not spread:
                fits(self.plan, f"load {self.plan.source} on {self.plan.device}")
            self._made.filler.place()
            self._open = stack.pop_all()
        self._ranks = shards.ranks if shards else None
        self.modules: Mapping[str, QuantModule] = self._made.filler.placed
        self.sizes = self._made.filler.sizes()
        coded = getattr(checkpoint.source, "coded", ())
        self._decoded = [tensor for tensor in self._made.filler.kept() if tensor.stored[0] in coded]
        self.decoded = frozenset(tensor.name.rpartition(".")[0] for tensor in self._decoded)
        for tensor in self._decoded:
            path, _, name = tensor.name.rpartition(".")
            model.get_submodule(path)._parameters[name] = None  # the other library would load codes into it

    def fill(self, device_of: DeviceOf | None = None, progress: Progress | None = None) -> Plan:
        """Reads and quantizes the weights, and marks the model as quantized.

        Args:
            device_of: Device of the module, or the parameter, of a name; that of the plan by default.
            progress: As for ``load``.

        Returns:
            The plan, with what the weights have turned out to hold.
        """
        made, filler, device = self._made, self._made.filler, self.plan.device.torch_device
        warn(made.plan.warnings)
        ranks, asked = self._ranks, f"load {self.plan.source}"
        place = device_of or (lambda _: device)
        with self._open, as_usual():
            if ranks:
                ranks.agree(filler.told(), asked)
                shared = (one for maxima in filler.maxima.values() for one in maxima.values())
                agree_on(shared, lambda: self._run(filler.maxima_tasks(place)), ranks, asked)
            with ranks.together(asked) if ranks else nullcontext(), unchanged(filler.source):
                decoded = filler.copy_tasks(self._decoded, IntoModel(made.model, place))
                self._run((*filler.weight_tasks(device_of=place), *decoded), progress)
        decided = filler.with_warnings()
        warn(decided.warnings[len(made.plan.warnings) :])
        if made.cache:
            made.cache.install()
        mark_configs(made.model)
        made.model.quantport_plan = decided  # type: ignore[assignment]  # a note on the model
        return decided

    def _run(self, tasks: Iterable[Task], progress: Progress | None = None) -> None:
        in_order = self._made.filler.in_order(tasks)
        largest = max((task.need for task in in_order), default=0)  # a shard may be read as a whole
        run_tasks(in_order, progress, budget=max(self.plan.budget, largest))
