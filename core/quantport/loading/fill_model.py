"""Fills a model that was built on meta: empty quantized modules take their places, and tasks read them and
everything else from the checkpoint, into the model or another `Destination`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from quantport.checkpoint import QuantizedWeight, Recognized
from quantport.errors import CheckpointError, WeightError
from quantport.loading.copy_tensors import HELD, SLAB, copy_tensor
from quantport.loading.destination import Destination, IntoModel, Put
from quantport.loading.executor import Task
from quantport.loading.place_tensors import HeldDtypes
from quantport.loading.shards import CutLayers
from quantport.loading.swap_modules import by_module, make_module, module_at, swap_modules
from quantport.loading.take_over import take_over_tasks
from quantport.loading.weight_tasks import WeightQuantizer
from quantport.model.layers import Layer
from quantport.model.patterns import compile_pattern
from quantport.modules import QuantModule
from quantport.modules.expert_form import holds_transposed
from quantport.numerics.shard_steps import SharedMaxima
from quantport.planning.plan import Plan
from quantport.planning.steps import Step
from quantport.plugins.registry import Registry

# what experts are fused into, and the projections of each expert in it
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Kept(NamedTuple):
    """A parameter or buffer that is not quantized.

    Attributes:
        name: In the model.
        stored: The stored tensors that make it up, one after the other.
        shape: In the model.
        dtype: In which it is held.
        transposed: Whether the model has the matrices of the stored tensor transposed.
    """

    name: str
    stored: Sequence[str]
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False


class ModelFiller:
    """Places empty quantized modules into a model on meta, and makes the tasks that fill it.

    Args:
        checkpoint: What is read.
        model: On meta; changed in place.
        plan: Which layer gets what.
        names: For each tensor of the checkpoint its name in the model.
        dtypes: In which dtype the model holds what stays.
        registry: Where the kernels of modules, and quantizers, come from.
        cut: What this rank holds of each layer; None for all of it.

    Attributes:
        by_path: Path -> the steps that the module there carries out.
        placed: Path -> quantized module, empty until the tasks have run.
        maxima: Layer name -> weight name -> what ranks have to agree on before the tasks run.
        warnings: For people: what the tensors that stay have turned out to hold. Grows while the tasks run.
    """

    def __init__(
        self,
        checkpoint: Recognized,
        model: nn.Module,
        plan: Plan,
        names: Mapping[str, str],
        dtypes: HeldDtypes,
        registry: Registry,
        cut: CutLayers | None = None,
    ) -> None:
        self.checkpoint, self.model, self.plan, self.names = checkpoint, model, plan, names
        self.source, self.dtypes, self.registry = checkpoint.source, dtypes, registry
        self.buffers = {name for name, _ in model.named_buffers()}
        self.layer_names = {name: s.layer.name for s in plan.steps for name in _tensors(s.layer)}
        self.placed: dict[str, QuantModule] = {}
        self.warnings: list[str] = []
        self._cut, self.maxima = cut, dict[str, dict[str, SharedMaxima]]()
        if cut:
            for step in plan.steps:
                if step.choice and not self._taken_over(step):
                    scheme = registry.schemes[step.scheme]
                    self.maxima[step.layer.name] = cut.maxima(step, scheme, plan.config.nonfinite)
        self.device, self.slab = plan.device.torch_device, min(SLAB, plan.budget // HELD)
        self.by_path = by_module(plan.steps, self._path)
        self._quantizers: dict[torch.device, WeightQuantizer] = {}

    def tasks(self, to: Destination | None = None) -> list[Task]:
        """One task for each weight and for each other tensor, in the order of the files.

        Args:
            to: Where what they read goes; into the model by default.
        """
        self.place()
        into = to or IntoModel(self.model, lambda _: self.device)
        return self.in_order((*self.weight_tasks(to), *self.copy_tasks(self.kept(), into)))

    def in_order(self, tasks: Iterable[Task]) -> list[Task]:
        """Tasks in the order of the files."""
        order = {name: i for i, name in enumerate(self.source.tensors)}
        return sorted(tasks, key=lambda task: order[task.name])

    def place(self) -> None:
        """Puts empty quantized modules where the layers that the plan quantizes stand."""
        for path, steps in self.by_path.items():
            old = self.model.get_submodule(path)
            self.placed[path] = make_module(steps, old, self.dtypes.dtype, self.registry)
        swap_modules(self.model, self.placed)

    def maxima_tasks(self, device_of: Callable[[str], torch.device]) -> Iterator[Task]:
        """Finds what the ranks have to agree on next; ``device_of`` as for `weight_tasks`."""
        for step in self.plan.steps:
            if maxima := self.maxima.get(step.layer.name):
                path = self._path(step.layer)
                quantizer = self._quantizer(device_of(path))
                times = self._cut.times_read(step.layer) if self._cut else 1
                for task in quantizer.maxima_tasks(self._as_read(step), self.placed[path], maxima):
                    yield task._replace(need=task.need * times)

    def told(self) -> str:
        """What of the plan must be the same on all ranks."""
        return self._cut.told(self.plan) if self._cut else ""

    def sizes(self) -> dict[str, int]:
        """Bytes that each module that was placed will hold."""
        return {path: sum(step.after for step in steps) for path, steps in self.by_path.items()}

    def weight_tasks(
        self, to: Destination | None = None, device_of: Callable[[str], torch.device] | None = None
    ) -> Iterator[Task]:
        """Fills the modules that were placed.

        Args:
            to: As for `tasks`.
            device_of: Device of the module at a path; that of the plan by default.
        """
        for path, steps in self.by_path.items():
            device = device_of(path) if device_of else self.device
            for step in steps:
                times = self._cut.times_read(step.layer) if self._cut else 1
                for task in self._weight_tasks(step, self.placed[path], path, to, device):
                    yield task._replace(module=path, need=task.need * times)

    def kept(self) -> Iterator[Kept]:
        """What is not quantized: every other tensor, and experts of which the checkpoint has each and the
        model all in one.
        """
        used = {name for s in self.plan.steps if s.choice or not s.layer.loaded for name in _tensors(s.layer)}
        for layer in self._to_fuse():
            used |= _tensors(layer)
            for name, projections in _FUSED.items():
                experts = zip(*(layer.parts[projection] for projection in projections), strict=True)
                tensors = [part.tensor for parts in experts for part in parts]
                fused = f"{self._path(layer)}.{name}"
                shape = tuple(self.model.get_parameter(fused).shape)  # in this order: ``_fits`` checked it
                yield Kept(fused, tensors, shape, layer.held_dtype or layer.dtype)
        turned = {name for layer in self._kept_experts() for name in self._turned(layer)}
        for name, info in self.source.tensors.items():
            if name not in used:
                own, shape = self.names[name], tuple(info.shape)
                shape = (shape[0], *shape[:0:-1]) if name in turned else shape
                _check_place(self.model, own, shape, info.dtype)
                yield Kept(own, [name], shape, self.dtypes.of(own, info.dtype), name in turned)

    def copy_tasks(self, kept: Iterable[Kept], to: Destination) -> Iterator[Task]:
        """Copies what is not quantized."""
        for tensor in kept:
            taken = partial(to.tensor, tensor.name, tensor.shape, tensor.dtype)
            task = self._copy_task(tensor.stored, taken, tensor.dtype, tensor.transposed)
            yield task._replace(module=tensor.name.rpartition(".")[0])

    def _kept_experts(self) -> Iterator[Layer]:
        """Experts that stay in 16 bits."""
        for step in self.plan.steps:
            if not step.choice and step.layer.experts and step.layer.loaded:
                yield step.layer

    def _to_fuse(self) -> Iterator[Layer]:
        """Those of which the checkpoint has each and the model all in one."""
        for layer in self._kept_experts():
            if not any(p.expert is not None for ps in layer.parts.values() for p in ps):
                yield layer

    def _turned(self, layer: Layer) -> set[str]:
        """The 3-D tensors of experts whose matrices the model has transposed, other than the checkpoint."""
        module, (_, hidden, intermediate) = module_at(self.model, self._path(layer)), layer.weights[-1]
        stored = layer.parts["down_proj"][0]
        if not hasattr(module, "gate_up_proj") or stored.expert is None:
            return set()
        if holds_transposed(module, intermediate, hidden) == stored.transposed:
            return set()
        return _tensors(layer)

    def _copy_task(
        self,
        tensors: Sequence[str],
        taken: Callable[[], AbstractContextManager[Put]],
        dtype: torch.dtype,
        transposed: bool = False,
    ) -> Task:
        """Copies the tensors that make up one of the model."""

        def run() -> None:
            with taken() as put:
                for name in tensors:
                    self._copy(name, put, dtype, transposed)

        infos = [self.source.tensors[name] for name in tensors]
        largest = max(info.nbytes for info in infos)
        slab = largest // infos[0].shape[0] if transposed else min(self.slab, largest)
        return Task(tensors[0], sum(info.nbytes for info in infos), run, HELD * slab)

    def with_warnings(self) -> Plan:
        """The plan, with what the tasks have found to warn of."""
        return replace(self.plan, warnings=self.plan.warnings + tuple(sorted(self.warnings)))

    def held(self) -> dict[str, torch.dtype]:
        """Dtype that each tensor which is not quantized gets, by its name in the model."""
        return {tensor.name: tensor.dtype for tensor in self.kept()}

    def _weight_tasks(
        self, step: Step, module: QuantModule, path: str, to: Destination | None, device: torch.device
    ) -> Iterable[Task]:
        """Fills a module, or a part of it, from codes or from values."""
        take = partial(to.weight, path, module) if to else None
        if weights := self._taken_over(step):
            budget, own = self.plan.budget, self._cut.stored(step.layer, weights) if self._cut else weights
            return take_over_tasks(step, module, own, self.source, take, device, budget)
        maxima = self.maxima.get(step.layer.name, {})
        return self._quantizer(device).tasks(self._as_read(step), module, take or module.set_steps, maxima)

    def _taken_over(self, step: Step) -> Mapping[str, QuantizedWeight]:
        """The weights of a layer that are quantized already and stay so; empty where it is quantized here."""
        stays = step.stored or not self.checkpoint.converts
        return self.checkpoint.quantized().get(step.layer.home, {}) if stays else {}

    def _as_read(self, step: Step) -> Step:
        """A step with the dtype of what is read to be quantized: codes are decoded to fp32."""
        if step.layer.home not in self.checkpoint.quantized():
            return step
        return replace(step, layer=replace(step.layer, dtype=torch.float32))

    def _quantizer(self, device: torch.device) -> WeightQuantizer:
        target = self.plan.device
        if device not in self._quantizers:
            self._quantizers[device] = WeightQuantizer(
                self.checkpoint.read,
                self.plan.config.nonfinite,
                self.registry.backends[target.kind].quantize_weight,
                device,
                storage_only_dtypes=target.arch.storage_only_dtypes,
            )
        return self._quantizers[device]

    def _copy(self, name: str, put: Put, dtype: torch.dtype, transposed: bool) -> None:
        """Copies a tensor that stays.

        Raises:
            WeightError: its values collapse in the dtype that it is held in.
        """
        seen = copy_tensor(self.source, put, name, self.slab, transposed)
        lost = seen.lost_in(dtype)
        own = self.layer_names.get(name, name)  # a format need not list what is no weight
        if lost and not any(compile_pattern(p).match(own) for p in self.plan.config.cast):
            stored = self.source.tensors[name].dtype
            suggestion = f"dtype=torch.float32, or config={{'cast': [{own!r}]}} to have it so"
            raise WeightError(f"hold {name} ({stored}) in {dtype}", lost, suggestion)
        buffer = self.names[name] in self.buffers
        if seen.nan or not (seen.finite or buffer):  # masks are buffers, and full of -inf
            self.warnings.append(f"{name} holds {'NaN' if seen.nan else 'Inf'}, and stays as it is stored")

    def _path(self, layer: Layer) -> str:
        return module_path(self.names, layer)


def _tensors(layer: Layer) -> set[str]:
    return {p.tensor for parts in layer.parts.values() for p in parts}


def _check_place(model: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuses a tensor of another shape than the parameter or buffer that it becomes, and for a parameter
    numbers of another kind, such as integers for a norm.
    """
    path, _, leaf = name.rpartition(".")
    module = module_at(model, path)
    if module is None:
        return
    parameter, buffer = module._parameters.get(leaf), module._buffers.get(leaf)
    old = buffer if parameter is None else parameter
    if old is None:
        return
    asked = f"load {name} into {type(module).__name__}"
    if tuple(old.shape) != shape:
        raise CheckpointError(
            asked,
            f"shape {list(shape)} in the checkpoint",
            f"shape {list(old.shape)}: a checkpoint and a model of the same sizes",
        )
    if parameter is not None and _numbers(parameter.dtype) != _numbers(dtype):
        found = f"{dtype} in the checkpoint, {parameter.dtype} in the model"
        raise CheckpointError(asked, found, f"a checkpoint with {_numbers(parameter.dtype)}")


def _numbers(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex numbers"
    return "floats" if dtype.is_floating_point else "integers"


def module_path(names: Mapping[str, str], layer: Layer) -> str:
    """Path of the module of a layer, whose tensors may be renamed between checkpoint and model."""
    part = next(p for parts in layer.parts.values() for p in parts)
    renamed = names.get(part.tensor, part.tensor)
    if layer.experts:
        return renamed[: f".{renamed}".rindex(".experts.") + len("experts")]
    # ``weight``; in a saved fused layer, ``q_proj.weight``
    inside = part.tensor.removeprefix(f"{layer.name}.")
    return renamed.removesuffix(f".{inside}") if inside != part.tensor else renamed.rpartition(".")[0]
