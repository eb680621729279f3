"""The tasks that fill quantized modules from 16-bit weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from quantport import numerics
from quantport.host import host
from quantport.layers import Part
from quantport.loading.stream import Task
from quantport.modules import QuantModule
from quantport.planner import Step

Reader = Callable[[Part], tuple[Tensor, Callable[[], None]]]


def quantize_tasks(
    step: Step, module: QuantModule, read: Reader, nonfinite: str, kind: str, device: torch.device | None = None
) -> Iterable[Task]:
    """The tasks that fill one module from 16-bit weights, quantized by the backend of a kind of device."""
    fast = host().backends[kind].quantize_weight

    def run(part: Part, weight: str) -> None:
        tensor, release = read(part)
        on_device = tensor.detach().to(device) if device else tensor.detach()
        name = f"{step.layer.name}.{weight}".rstrip(".")
        stored = numerics.quantize_weight(on_device, module.specs[weight].scheme, name, nonfinite, fast)
        release()
        module.set_weight(weight, stored)

    for name, n, k in step.layer.weights:
        for e, part in enumerate(step.layer.parts[name]):
            weight = f"{e}.{name}" if step.layer.experts else name if len(step.layer.weights) > 1 else ""
            yield Task(part.tensor, n * k * step.layer.dtype.itemsize, partial(run, part, weight))


def select(tensor: Tensor, part: Part) -> Tensor:
    """The weight that a part names, out of its tensor."""
    tensor = tensor if part.expert is None else tensor[part.expert]
    return tensor[part.start : part.stop]
