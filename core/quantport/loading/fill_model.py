"""Fills a model that was built on meta: empty quantized modules take their places, and tasks fill them and
everything else from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from quantport.checkpoint import Recognized
from quantport.errors import CheckpointError
from quantport.loading.copy_tensors import SLAB, copy_into
from quantport.loading.executor import Task
from quantport.loading.swap_modules import by_module, make_module, module_at, swap_modules
from quantport.loading.take_over import take_over_tasks
from quantport.loading.weight_tasks import quantize_tasks
from quantport.model.layers import Layer
from quantport.model.roles import SkipCode
from quantport.modules import QuantModule
from quantport.planning.plan import Plan, Step
from quantport.plugins.registry import Registry

HALVES = (torch.bfloat16, torch.float16)


class ModelFiller:
    """Places empty quantized modules into a model on meta, and makes the tasks that fill it.

    Args:
        checkpoint: What is read.
        model: On meta; changed in place.
        plan: Which layer gets what.
        names: For each tensor of the checkpoint its name in the model.
        dtype: The 16-bit dtype of the model.
        explicit: Whether ``dtype`` was asked for: then it also holds for tensors in fp32.
        registry: Where the kernels of modules, and quantizers, come from.
    """

    def __init__(
        self,
        checkpoint: Recognized,
        model: nn.Module,
        plan: Plan,
        names: Mapping[str, str],
        dtype: torch.dtype,
        explicit: bool,
        registry: Registry,
    ) -> None:
        self.checkpoint, self.model, self.plan, self.names = checkpoint, model, plan, names
        self.source, self.dtype, self.explicit = checkpoint.source, dtype, explicit
        self.registry = registry
        self.device, self.slab = plan.device.torch_device, min(SLAB, plan.budget)

    def tasks(self) -> list[Task]:
        """One task for each weight and for each other tensor, in the order of the files."""
        out: list[Task] = []
        new: dict[str, nn.Module] = {}
        used: set[str] = set()
        quantized = self.checkpoint.quantized()
        for path, steps in by_module(self.plan.steps, self._path).items():
            module = new[path] = make_module(steps, self.model.get_submodule(path), self.dtype, self.registry)
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
            lost = step.layer.skipped_as(SkipCode.NO_MODULE)
            if not step.choice and step.layer.experts and not fused and not lost:
                path = self._path(step.layer)
                out += [task._replace(module=path) for task in self._fuse_tasks(step.layer)]
                used |= _tensors(step.layer)
        swap_modules(self.model, new)
        for name, info in self.source.tensors.items():
            if name not in used:
                _check_shape(self.model, self.names[name], info.shape)
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
            empty = torch.empty(old.shape, dtype=self._cast(layer.dtype), device=self.device)
            module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for projection, n, k in layer.weights:
            target, start = rows[projection]
            fused = module._parameters[target]
            assert fused is not None  # set above
            for e, part in enumerate(layer.parts[projection]):
                size = n * k * layer.dtype.itemsize
                run = partial(
                    copy_into, self.source, fused.data[e, start : start + n], part.tensor, self.slab
                )
                yield Task(part.tensor, size, run, min(self.slab, size))

    def kept(self) -> dict[str, torch.dtype]:
        """Dtype that each tensor which is not quantized gets, by its name in the model."""
        return {self.names[name]: self._cast(info.dtype) for name, info in self.source.tensors.items()}

    def _cast(self, stored: torch.dtype) -> torch.dtype:
        """The dtype of a tensor that stays: 16-bit floats follow the model, all floats follow a dtype that
        was asked for.
        """
        return self.dtype if stored in HALVES or (self.explicit and stored is torch.float32) else stored

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
        target = torch.empty(info.shape, dtype=self._cast(info.dtype), device=self.device)
        copy_into(self.source, target, name, self.slab)
        _assign(self.model, self.names[name], target)

    def _path(self, layer: Layer) -> str:
        return module_path(self.names, layer)


def _tensors(layer: Layer) -> set[str]:
    return {p.tensor for parts in layer.parts.values() for p in parts}


def _check_shape(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    path, _, leaf = name.rpartition(".")
    module = module_at(model, path)
    if module is None:
        return
    parameter, buffer = module._parameters.get(leaf), module._buffers.get(leaf)
    old = buffer if parameter is None else parameter
    if old is not None and tuple(old.shape) != tuple(shape):
        raise CheckpointError(
            f"load {name} into {type(module).__name__}",
            f"shape {list(shape)} in the checkpoint",
            f"shape {list(old.shape)}: a checkpoint and a model of the same sizes",
        )


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
