"""The tasks that fill quantized modules from weights that are stored as their schemes have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from quantport.checkpoint import QuantizedWeight, TensorSource
from quantport.kernels.base import WeightSpec
from quantport.kernels.packing import layout_of
from quantport.loading.executor import Task
from quantport.loading.weight_tasks import Take
from quantport.modules import QuantExperts, QuantModule
from quantport.numerics.by_rows import QuantizedRows, stored_slices
from quantport.planning.memory import step_rows
from quantport.planning.steps import Step


def take_over_tasks(
    step: Step,
    module: QuantModule,
    weights: Mapping[str, QuantizedWeight],
    source: TensorSource,
    take: Take | None,
    device: torch.device,
    budget: int,
) -> Iterator[Task]:
    """One task for each weight: its bits are taken as they are, some rows at a time where they are stored as
    the layout has them.

    Args:
        step: The layer, or the piece of a layer.
        module: Whose weights they are.
        weights: Each weight by its name in the module.
        source: Where they are read.
        take: Takes each weight by its name in the module, as ``module.set_steps`` does; None for the module
            itself, which may keep what is read.
        device: Where to.
        budget: That of the plan: a weight of another format that needs more is read alone.
    """
    for name, _, _ in step.layer.each:
        spec, weight, kernel = module.specs[name], weights[name], module.kernel_of(name)
        size = sum(source.tensors[t].nbytes for t in weight.tensors) if weight.size is None else weight.size
        stored = weight.source or source
        if take is None and weight.keys and kernel.keeps_layout and _may_stay(stored, device):
            yield Task(weight.tensors[0], size, partial(_map, module, name, weight, stored))
            continue
        layout = None if isinstance(module, QuantExperts) else layout_of(kernel, spec)
        rows = step_rows(spec, module.dtype, layout)
        whole = 0 if weight.keys and layout and rows < spec.n else size
        steps = partial(_steps, weight, spec, source, device, rows)
        need = min(budget, 2 * spec.scheme.bytes(rows, spec.k) + whole)
        yield Task(weight.tensors[0], size, partial(_take, take or module.set_steps, name, steps), need)


def _may_stay(source: TensorSource, device: torch.device) -> bool:
    """Whether a module may keep what is read: the pages of a file are then shared by all that map it."""
    return device.type == "cpu" and bool(getattr(source, "mapped", False))


def _map(module: QuantModule, name: str, weight: QuantizedWeight, source: TensorSource) -> None:
    module.set_weight(name, {key: source.read(tensor) for key, tensor in weight.keys.items()})


def _take(take: Take, name: str, steps: Callable[[], Iterator[QuantizedRows]]) -> None:
    take(name, steps())


def _steps(
    weight: QuantizedWeight, spec: WeightSpec, source: TensorSource, device: torch.device, rows: int
) -> Iterator[QuantizedRows]:
    if rows >= spec.n:
        stored = {key: t.to(device, copy=True) for key, t in weight.read(slice(0, spec.n)).items()}
        for tensor in weight.tensors:
            source.release(tensor)
        yield QuantizedRows(0, spec.n, stored)
        return
    for start in range(0, spec.n, rows):
        stop = min(start + rows, spec.n)
        some = stored_slices(spec.scheme, spec.k, start, stop)
        stored = {
            # who takes rows copies them to their place; what all of them share may be kept
            key: tensor.to(device, copy=some[key] is None)
            for key, tensor in weight.read(slice(start, stop)).items()
        }
        yield QuantizedRows(start, stop, stored)
        for key, tensor in weight.keys.items():
            (weight.source or source).release(tensor, some[key])
    if not weight.keys:
        for tensor in weight.tensors:
            source.release(tensor)
