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
from quantport.planning.memory import peak_bytes
from quantport.planning.plan import Step
from quantport.scheme import Scheme

Fast = Callable[[Tensor, Scheme], StoredWeight | None]
Reader = Callable[[Part], tuple[Tensor, Callable[[], None]]]


def quantize_tasks(
    step: Step,
    module: QuantModule,
    read: Reader,
    nonfinite: str,
    fast: Fast,
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
        name = f"{layer.home}.{weight}".rstrip(".")
        scheme = module.specs[weight].scheme
        stored = quantize_on(tensor, scheme, name, nonfinite, fast, device, storage_only_dtypes)
        del tensor
        release()
        module.set_weight(weight, stored)

    for weight, n, k in layer.each:
        part = layer.part(weight)
        held = peak_bytes(module.specs[weight], None if owned else layer.dtype)
        yield Task(part.tensor, n * k * layer.dtype.itemsize, partial(run, part, weight), held)


def quantize_on(
    weight: Tensor,
    scheme: Scheme,
    name: str,
    nonfinite: str,
    fast: Fast,
    device: torch.device | None,
    storage_only_dtypes: frozenset[torch.dtype] = frozenset(),
) -> dict[str, Tensor]:
    """Quantizes a weight ``[n, k]`` with the backend of a device; arguments as `quantize_tasks`.

    Returns:
        The tensors of ``scheme.layout(n, k)`` on ``device``.
    """
    dtypes = (weight.dtype, *(dtype for _, dtype in scheme.layout(*weight.shape).values()))
    on_host = device is not None and not storage_only_dtypes.isdisjoint(dtypes)
    source = weight.detach().to(device) if device and not on_host else weight.detach()
    stored = numerics.quantize_weight(source, scheme, name, nonfinite, None if on_host else fast)
    return {key: t.to(device) for key, t in stored.items()} if on_host else stored


def select(tensor: Tensor, part: Part) -> Tensor:
    """The weight that a part names, out of its tensor."""
    tensor = tensor if part.expert is None else tensor[part.expert]
    return tensor[part.start : part.stop]
