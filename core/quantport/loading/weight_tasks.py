"""The tasks that fill quantized modules from 16-bit weights: one for each projection of each expert."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from types import MappingProxyType

import torch
from torch import Tensor

from quantport import numerics
from quantport.kernels.base import Kernel, StoredWeight, WeightSpec
from quantport.kernels.packing import layout_of
from quantport.loading.executor import Task
from quantport.model.layers import Layer, Part
from quantport.modules import QuantModule
from quantport.numerics.by_rows import QuantizedRows, ReadRows, quantize_steps, spans_rows
from quantport.numerics.shard_steps import SharedMaxima
from quantport.planning.memory import peak_with, step_rows
from quantport.planning.steps import Step
from quantport.scheme import Scheme

Fast = Callable[[Tensor, Scheme], StoredWeight | None]
Take = Callable[[str, Iterator[QuantizedRows]], None]
Reader = Callable[[Part], tuple[Tensor, Callable[[], None]]]


def quantize_tasks(
    step: Step,
    module: QuantModule,
    take: Take,
    read: Reader,
    nonfinite: str,
    fast: Fast,
    device: torch.device | None = None,
    owned: bool = False,
    storage_only_dtypes: frozenset[torch.dtype] = frozenset(),
    maxima: Mapping[str, SharedMaxima] = MappingProxyType({}),
) -> Iterable[Task]:
    """The tasks that fill one module from 16-bit weights.

    Args:
        step: The layer, or the piece of a layer.
        module: Whose weights they are.
        take: Takes each weight by its name in the module, as ``module.set_steps`` does.
        read: Gives the 16-bit tensor of a part, and what to call when it has been used.
        nonfinite: ``error`` or ``zero``.
        fast: ``Backend.quantize_weight`` of the device.
        device: Where to; None to leave the weights where they are.
        owned: The caller holds the 16-bit weights anyway: they are no part of the stream.
        storage_only_dtypes: Those of the architecture: weights of these dtypes, or stored in them, are
            quantized on the host.
        maxima: Name of each weight whose scales span ranks -> what those have agreed on.
    """
    layer = step.layer

    def run(part: Part, weight: str) -> None:
        spec = module.specs[weight]
        rows = partial(_rows, read, part, spec.n)
        name, kernel = weight_name(layer, weight), module.kernel_of(weight)
        shared = maxima.get(weight)
        steps = quantize_on(
            rows, layer.dtype, spec, name, nonfinite, fast, device, storage_only_dtypes, kernel, shared
        )
        take(weight, steps)

    for weight, n, k in layer.each:
        part, kernel = layer.part(weight), None if layer.experts else module.kernel_of(weight)
        size, held = (
            n * k * layer.dtype.itemsize,
            _held(kernel, module.specs[weight], layer.dtype, read=not owned),
        )
        if not (owned or part.in_place):
            held += size if part.start is None else 2 * size  # all that it is gathered from
        if weight in maxima:
            held += _held_whole(module.specs[weight], layer.dtype)
        yield Task(part.tensor, size, partial(run, part, weight), held)


def maxima_tasks(
    step: Step,
    module: QuantModule,
    read: Reader,
    device: torch.device,
    storage_only_dtypes: frozenset[torch.dtype],
    maxima: Mapping[str, SharedMaxima],
) -> Iterator[Task]:
    """The tasks that find what ranks have to agree on next, for the weights of a module that need it;
    arguments as for `quantize_tasks`.
    """
    layer = step.layer
    for weight, shared in maxima.items():
        if shared.complete:
            continue
        part, spec = layer.part(weight), module.specs[weight]
        rows, _ = _where(partial(_rows, read, part, spec.n), layer.dtype, spec, device, storage_only_dtypes)
        count = _step_rows(module.kernel_of(weight), spec, layer.dtype)
        held = _held(None, spec, layer.dtype) + _held_whole(spec, layer.dtype)
        size = spec.n * spec.k * layer.dtype.itemsize
        yield Task(part.tensor, size, partial(shared.find_next, rows, count), held)


def weight_name(layer: Layer, weight: str) -> str:
    """What errors call a weight of a layer."""
    return f"{layer.home}.{weight}".rstrip(".")


def _held_whole(spec: WeightSpec, dtype: torch.dtype) -> int:
    """Bytes of a shard that is read and quantized as a whole, since a scale spans all of its rows."""
    whole = spec.n * spec.k * dtype.itemsize + spec.scheme.bytes(spec.n, spec.k)
    return whole if spans_rows(spec.scheme.weight) else 0


_held = lru_cache(maxsize=256)(peak_with)  # the layers of a model repeat


@lru_cache(maxsize=256)
def _step_rows(kernel: Kernel | None, spec: WeightSpec, dtype: torch.dtype) -> int:
    return step_rows(spec, dtype, layout_of(kernel, spec) if kernel else None)


def quantize_on(
    read: ReadRows,
    dtype: torch.dtype,
    spec: WeightSpec,
    name: str,
    nonfinite: str,
    fast: Fast,
    device: torch.device | None,
    storage_only_dtypes: frozenset[torch.dtype] = frozenset(),
    kernel: Kernel | None = None,
    shared: SharedMaxima | None = None,
) -> Iterator[QuantizedRows]:
    """Quantizes a weight some rows at a time on the backend of a device; other arguments as `quantize_tasks`.

    Args:
        read: Gives rows of the weight.
        dtype: Dtype of the rows.
        spec: Scheme and shape.
        name: Of the weight, for errors.
        kernel: Packs the rows, where it does that.
        shared: For a shard whose scales span ranks: what those have agreed on.

    Returns:
        The stored tensors of the rows, on ``device``.
    """
    rows, on_host = _where(read, dtype, spec, device, storage_only_dtypes)

    def quantize(values: Tensor, scheme: Scheme) -> StoredWeight:
        return numerics.quantize_weight(values, scheme, name, nonfinite, None if on_host else fast)

    shape, count = (spec.n, spec.k), _step_rows(kernel, spec, dtype)
    if shared:
        steps = shared.quantize_steps(rows, count)
    elif count < spec.n:
        steps = quantize_steps(rows, shape, spec.scheme, count, quantize, name=name, nonfinite=nonfinite)
    else:
        with rows(0, spec.n) as values:
            steps = iter((QuantizedRows(0, spec.n, quantize(values, spec.scheme)),))
    if not on_host:
        return steps
    return (part._replace(stored={key: t.to(device) for key, t in part.stored.items()}) for part in steps)


def _where(
    read: ReadRows,
    dtype: torch.dtype,
    spec: WeightSpec,
    device: torch.device | None,
    storage_only_dtypes: frozenset[torch.dtype],
) -> tuple[ReadRows, bool]:
    """Gives rows where they are quantized, and says whether that is the host in place of ``device``."""
    dtypes = (dtype, *(stored for _, stored in spec.scheme.layout(spec.n, spec.k).values()))
    on_host = device is not None and not storage_only_dtypes.isdisjoint(dtypes)
    return partial(_on, None if on_host else device, read), on_host


@contextmanager
def _rows(read: Reader, part: Part, n: int, start: int, stop: int) -> Iterator[Tensor]:
    """Rows of a weight of ``n`` rows, released after the block."""
    tensor, release = read(part if stop - start == n else part.rows(start, stop))
    yield tensor
    del tensor
    release()


@contextmanager
def _on(device: torch.device | None, read: ReadRows, start: int, stop: int) -> Iterator[Tensor]:
    """Rows on a device; where they are for None."""
    with read(start, stop) as values:
        yield values.detach().to(device) if device else values.detach()
