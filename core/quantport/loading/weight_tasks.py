"""The tasks that fill quantized modules from 16-bit weights: one for each projection of each expert."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from types import MappingProxyType

import torch
from torch import Tensor

from quantport import numerics
from quantport.errors import WeightError
from quantport.kernels.base import Kernel, StoredWeight, WeightSpec
from quantport.kernels.packing import layout_of
from quantport.loading.executor import Task
from quantport.model.layers import Layer, Part
from quantport.modules import QuantModule
from quantport.numerics.by_rows import (
    QuantizedRows,
    ReadRows,
    join_steps,
    quantize_steps,
    spans_rows,
    stacks,
)
from quantport.numerics.shard_steps import SharedMaxima
from quantport.planning.memory import peak_with, step_rows
from quantport.planning.steps import Step
from quantport.scheme import Scheme

SMALL = 64 << 10  # bytes of a weight that is quantized together with its like

Fast = Callable[[Tensor, Scheme], StoredWeight | None]
Take = Callable[[str, Iterator[QuantizedRows]], None]
Reader = Callable[[Part], tuple[Tensor, Callable[[], None]]]


@dataclass(frozen=True, eq=False)
class WeightQuantizer:
    """Makes the tasks that fill modules from 16-bit weights.

    Args:
        read: Gives the 16-bit tensor of a part, and what to call when it has been used.
        nonfinite: ``error`` or ``zero``.
        fast: ``Backend.quantize_weight`` of the device.
        device: Where to; None to leave the weights where they are.
        owned: The caller holds the 16-bit weights anyway: they are no part of the stream.
        storage_only_dtypes: Those of the architecture: weights of these dtypes, or stored in them, are
            quantized on the host.
        by_turns: Held while many small tensors pass through Python: two threads that do so at once take twice
            the CPU time, since each waits for the other after every call of torch.
    """

    read: Reader
    nonfinite: str
    fast: Fast
    device: torch.device | None = None
    owned: bool = False
    storage_only_dtypes: frozenset[torch.dtype] = frozenset()
    by_turns: threading.Lock = field(default_factory=threading.Lock)

    def tasks(
        self,
        step: Step,
        module: QuantModule,
        take: Take,
        maxima: Mapping[str, SharedMaxima] = MappingProxyType({}),
    ) -> Iterable[Task]:
        """The tasks that fill one module, or a part of it.

        Args:
            step: The layer, or the piece of a layer.
            module: Whose weights they are.
            take: Takes each weight by its name in the module, as ``module.set_steps`` does.
            maxima: Name of each weight whose scales span ranks -> what those have agreed on.
        """
        layer = step.layer
        for weight, n, k in layer.each:
            part, kernel, spec = layer.part(weight), module.kernel_of(weight), module.specs[weight]
            size, alike = n * k * layer.dtype.itemsize, _Alike(self, spec, layer.dtype, kernel)
            shared = maxima.get(weight)
            stacked = _stacks(spec, layer.dtype) and not shared
            held = _held(None if layer.experts else kernel, spec, layer.dtype, read=stacked or not self.owned)
            if not (self.owned or part.in_place):
                held += size if part.start is None else 2 * size  # all that it is gathered from
            if shared:
                held += _held_whole(spec, layer.dtype)
            fill = _Fill(alike, part, weight_name(layer, weight), partial(take, weight), shared)
            yield Task(part.tensor, size, fill, held, together=alike if stacked else None)

    def maxima_tasks(
        self, step: Step, module: QuantModule, maxima: Mapping[str, SharedMaxima]
    ) -> Iterator[Task]:
        """The tasks that find what ranks have to agree on next, for the weights of a module that need it;
        arguments as for `tasks`.
        """
        layer = step.layer
        for weight, shared in maxima.items():
            if shared.complete:
                continue
            part, spec = layer.part(weight), module.specs[weight]
            read = partial(_rows, self.read, part, spec.n)
            rows, _ = _where(read, layer.dtype, spec, self.device, self.storage_only_dtypes)
            count = _step_rows(module.kernel_of(weight), spec, layer.dtype)
            held = _held(None, spec, layer.dtype) + _held_whole(spec, layer.dtype)
            size = spec.n * spec.k * layer.dtype.itemsize
            yield Task(part.tensor, size, partial(shared.find_next, rows, count), held)


@dataclass(frozen=True)
class _Alike:
    """What weights have in common that may be quantized as one, each standing below the one before: a small
    one by itself takes longer to be led through Python than to be quantized.
    """

    quantizer: WeightQuantizer
    spec: WeightSpec
    dtype: torch.dtype
    kernel: Kernel

    def __call__(self, fills: Sequence[_Fill]) -> None:
        with self.quantizer.by_turns:
            read, releases = zip(*(self.quantizer.read(fill.part) for fill in fills), strict=True)
            stack = torch.cat([tensor.detach() for tensor in read])
            del read
            for release in releases:
                release()
        stored = self._stored(stack, fills[0].name)
        if stored is None:
            for fill in fills:
                fill()
            return
        each = {key: tensor.split(len(tensor) // len(fills)) for key, tensor in stored.items()}
        with self.quantizer.by_turns:
            for i, fill in enumerate(fills):
                rows = {key: tensors[i].clone() for key, tensors in each.items()}
                fill.take(iter((QuantizedRows(0, self.spec.n, rows),)))

    def _stored(self, stack: Tensor, name: str) -> StoredWeight | None:
        """The stored tensors of all; None where one cannot be quantized: which, each by itself says."""
        try:
            steps = self.quantize(lambda start, stop: nullcontext(stack[start:stop]), len(stack), name)
            return join_steps(steps, self.spec.scheme, (len(stack), self.spec.k))
        except WeightError:
            return None

    def quantize(
        self, read: ReadRows, n: int, name: str, shared: SharedMaxima | None = None
    ) -> Iterator[QuantizedRows]:
        """Quantizes ``n`` rows, of one weight or of several."""
        made = self.quantizer
        return quantize_on(
            read,
            self.dtype,
            replace(self.spec, n=n),
            name,
            made.nonfinite,
            made.fast,
            made.device,
            made.storage_only_dtypes,
            self.kernel,
            shared,
        )


@dataclass(frozen=True)
class _Fill:
    """Quantizes one weight."""

    alike: _Alike
    part: Part
    name: str
    take: Callable[[Iterator[QuantizedRows]], None]
    shared: SharedMaxima | None

    def __call__(self) -> None:
        n = self.alike.spec.n
        rows = partial(_rows, self.alike.quantizer.read, self.part, n)
        self.take(self.alike.quantize(rows, n, self.name, self.shared))


def weight_name(layer: Layer, weight: str) -> str:
    """What errors call a weight of a layer."""
    return f"{layer.home}.{weight}".rstrip(".")


def _held_whole(spec: WeightSpec, dtype: torch.dtype) -> int:
    """Bytes of a shard that is read and quantized as a whole, since a scale spans all of its rows."""
    whole = spec.n * spec.k * dtype.itemsize + spec.scheme.bytes(spec.n, spec.k)
    return whole if spans_rows(spec.scheme.weight) else 0


_held = lru_cache(maxsize=256)(peak_with)  # the layers of a model repeat


@lru_cache(maxsize=256)
def _stacks(spec: WeightSpec, dtype: torch.dtype) -> bool:
    return spec.n * spec.k * dtype.itemsize <= SMALL and stacks(spec.scheme, spec.n)


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
    """Quantizes a weight some rows at a time on the backend of a device; other arguments as of
    `WeightQuantizer`.

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
