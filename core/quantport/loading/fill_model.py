"""Fills a model that was built on meta: empty quantized modules take their places, and tasks fill them and
everything else from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from quantport.checkpoint import Recognized
from quantport.errors import CheckpointError, WeightError
from quantport.loading.copy_tensors import SLAB, copy_into
from quantport.loading.executor import Task
from quantport.loading.place_tensors import HeldDtypes
from quantport.loading.swap_modules import by_module, make_module, module_at, swap_modules
from quantport.loading.take_over import take_over_tasks
from quantport.loading.weight_tasks import quantize_tasks
from quantport.model.layers import Layer, TensorLike
from quantport.model.patterns import compile_pattern
from quantport.modules import QuantModule
from quantport.planning.plan import Plan, Step
from quantport.plugins.registry import Registry


class ModelFiller:
    """Places empty quantized modules into a model on meta, and makes the tasks that fill it.

    Args:
        checkpoint: What is read.
        model: On meta; changed in place.
        plan: Which layer gets what.
        names: For each tensor of the checkpoint its name in the model.
        dtypes: In which dtype the model holds what stays.
        registry: Where the kernels of modules, and quantizers, come from.

    Attributes:
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
    ) -> None:
        self.checkpoint, self.model, self.plan, self.names = checkpoint, model, plan, names
        self.source, self.dtypes, self.registry = checkpoint.source, dtypes, registry
        self.buffers = {name for name, _ in model.named_buffers()}
        self.layer_names = {name: s.layer.name for s in plan.steps for name in _tensors(s.layer)}
        self.warnings: list[str] = []
        self.device, self.slab = plan.device.torch_device, min(SLAB, plan.budget)

    def tasks(self) -> list[Task]:
        """One task for each weight and for each other tensor, in the order of the files."""
        out: list[Task] = []
        new: dict[str, nn.Module] = {}
        used = {name for s in self.plan.steps if not s.layer.loaded for name in _tensors(s.layer)}
        quantized = self.checkpoint.quantized()
        for path, steps in by_module(self.plan.steps, self._path).items():
            module = new[path] = make_module(
                steps, self.model.get_submodule(path), self.dtypes.dtype, self.registry
            )
            weights = quantized.get(steps[0].layer.home)
            tasks = (
                [task for step in steps for task in self._quantize_tasks(step, module)]
                if weights is None
                else take_over_tasks(module, weights, self.source, self.device, self.plan.budget)
            )
            out += [task._replace(module=path) for task in tasks]
            used |= _tensors(steps[0].layer)
        for step in self.plan.steps:
            fused = any(p.expert is not None for ps in step.layer.parts.values() for p in ps)
            if not step.choice and step.layer.experts and not fused and step.layer.loaded:
                path = self._path(step.layer)
                out += [task._replace(module=path) for task in self._fuse_tasks(step.layer)]
                used |= _tensors(step.layer)
        swap_modules(self.model, new)
        for name, info in self.source.tensors.items():
            if name not in used:
                _check_place(self.model, self.names[name], info)
                path = self.names[name].rpartition(".")[0]
                need = min(self.slab, info.nbytes)
                out.append(Task(name, info.nbytes, partial(self._copy, name), need, path))
        order = {name: i for i, name in enumerate(self.source.tensors)}
        return sorted(out, key=lambda t: order[t.name])

    def _fuse_tasks(self, layer: Layer) -> Iterable[Task]:
        """Fills the fused 3-D weights of experts that stay in 16 bits from the tensors of each expert."""
        module = self.model.get_submodule(self._path(layer))
        rows = {
            "gate_proj": ("gate_up_proj", 0),
            "up_proj": ("gate_up_proj", layer.weights[0][1]),
            "down_proj": ("down_proj", 0),
        }
        for name in ("gate_up_proj", "down_proj"):
            old = module._parameters[name]
            assert old is not None  # why_not_experts checked it
            empty = torch.empty(old.shape, dtype=layer.held_dtype or layer.dtype, device=self.device)
            module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for projection, n, k in layer.weights:
            target, start = rows[projection]
            fused = module._parameters[target]
            assert fused is not None  # set above
            for e, part in enumerate(layer.parts[projection]):
                size = n * k * layer.dtype.itemsize
                run = partial(self._copy_into, fused.data[e, start : start + n], part.tensor)
                yield Task(part.tensor, size, run, min(self.slab, size))

    def with_warnings(self) -> Plan:
        """The plan, with what the tasks have found to warn of."""
        return replace(self.plan, warnings=self.plan.warnings + tuple(sorted(self.warnings)))

    def held(self) -> dict[str, torch.dtype]:
        """Dtype that each tensor which is loaded and not quantized gets, by its name in the model."""
        absent = {name for s in self.plan.steps if not s.layer.loaded for name in _tensors(s.layer)}
        return {
            self.names[name]: self.dtypes.of(self.names[name], info.dtype)
            for name, info in self.source.tensors.items()
            if name not in absent
        }

    def _quantize_tasks(self, step: Step, module: QuantModule) -> Iterable[Task]:
        target, nonfinite = self.plan.device, self.plan.config.nonfinite
        return quantize_tasks(
            step,
            module,
            self.checkpoint.read,
            nonfinite,
            self.registry.backends[target.kind].quantize_weight,
            self.device,
            storage_only_dtypes=target.arch.storage_only_dtypes,
        )

    def _copy(self, name: str) -> None:
        info = self.source.tensors[name]
        dtype = self.dtypes.of(self.names[name], info.dtype)
        target = torch.empty(info.shape, dtype=dtype, device=self.device)
        self._copy_into(target, name)
        _assign(self.model, self.names[name], target)

    def _copy_into(self, target: Tensor, name: str) -> None:
        """Copies a tensor that stays.

        Raises:
            WeightError: its values collapse in the dtype that it is held in.
        """
        seen = copy_into(self.source, target, name, self.slab)
        lost = seen.lost_in(target.dtype)
        own = self.layer_names.get(name, name)  # a format need not list what is no weight
        if lost and not any(compile_pattern(p).match(own) for p in self.plan.config.cast):
            stored = self.source.tensors[name].dtype
            suggestion = f"dtype=torch.float32, or config={{'cast': [{own!r}]}} to have it so"
            raise WeightError(f"hold {name} ({stored}) in {target.dtype}", lost, suggestion)
        buffer = self.names[name] in self.buffers
        if seen.nan or not (seen.finite or buffer):  # masks are buffers, and full of -inf
            self.warnings.append(f"{name} holds {'NaN' if seen.nan else 'Inf'}, and stays as it is stored")

    def _path(self, layer: Layer) -> str:
        return module_path(self.names, layer)


def _tensors(layer: Layer) -> set[str]:
    return {p.tensor for parts in layer.parts.values() for p in parts}


def _check_place(model: nn.Module, name: str, stored: TensorLike) -> None:
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
    if tuple(old.shape) != tuple(stored.shape):
        raise CheckpointError(
            asked,
            f"shape {list(stored.shape)} in the checkpoint",
            f"shape {list(old.shape)}: a checkpoint and a model of the same sizes",
        )
    if parameter is not None and _numbers(parameter.dtype) != _numbers(stored.dtype):
        found = f"{stored.dtype} in the checkpoint, {parameter.dtype} in the model"
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


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Sets a parameter or buffer by name; names that the model does not have are left to ``_finish``."""
    path, _, leaf = name.rpartition(".")
    module = module_at(model, path)
    if module is None:
        return
    if leaf in module._parameters:
        old = module._parameters[leaf]
        module._parameters[leaf] = nn.Parameter(
            value, old is not None and old.requires_grad and value.is_floating_point()
        )
    elif leaf in module._buffers:
        module._buffers[leaf] = value
