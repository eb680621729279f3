"""The tasks that fill quantized modules from 16-bit weights: one for each projection of each expert."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from quantport import numerics
from quantport.kernels.base import StoredWeight
from quantport.loading.executor import Task
from quantport.model.layers import Part
from quantport.modules import QuantModule
from quantport.planning.memory import need
from quantport.planning.plan import Step
from quantport.scheme import Scheme

Reader = Callable[[Part], tuple[Tensor, Callable[[], None]]]


def quantize_tasks(
    step: Step,
    module: QuantModule,
    read: Reader,
    nonfinite: str,
    fast: Callable[[Tensor, Scheme], StoredWeight | None],
    device: torch.device | None = None,
    owned: bool = False,
    storage_only_dtypes: frozenset[torch.dtype] = frozenset(),
) -> Iterable[Task]:
    """The tasks that fill one module from 16-bit weights.

    Args:
        step: The layer, or the piece of a layer.
        module: Takes the weights.
        read: Gives the 16-bit tensor of a part, and what to call when it has been used.
        nonfinite: ``error`` or ``zero``.
        fast: ``Backend.quantize_weight`` of the device.
        device: Where to; None to leave the weights where they are.
        owned: The caller holds the 16-bit weights anyway: they are no part of the stream.
        storage_only_dtypes: Those of the architecture: weights of these dtypes, or stored in them, are
            quantized on the host.
    """
    layer = step.layer

    def run(part: Part, weight: str) -> None:
        tensor, release = read(part)
        scheme = module.specs[weight].scheme
        dtypes = (tensor.dtype, *(dtype for _, dtype in scheme.layout(*tensor.shape).values()))
        here = device is not None and not storage_only_dtypes.isdisjoint(dtypes)
        source = tensor.detach().to(device) if device and not here else tensor.detach()
        name = f"{layer.home}.{weight}".rstrip(".")
        stored = numerics.quantize_weight(source, scheme, name, nonfinite, None if here else fast)
        del tensor, source
        release()
        module.set_weight(weight, {key: t.to(device) for key, t in stored.items()} if here else stored)

    for weight, n, k in layer.each:
        part = layer.part(weight)
        held = need(module.specs[weight], None if owned else layer.dtype)
        yield Task(part.tensor, n * k * layer.dtype.itemsize, partial(run, part, weight), held)


def select(tensor: Tensor, part: Part) -> Tensor:
    """The weight that a part names, out of its tensor."""
    tensor = tensor if part.expert is None else tensor[part.expert]
    return tensor[part.start : part.stop]
