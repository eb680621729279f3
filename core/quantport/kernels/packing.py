"""Packs and unpacks a weight some rows at a time, where its kernel does that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

from torch import Tensor

from quantport.errors import BackendError, WeightError
from quantport.kernels.allocate import empty_weight
from quantport.kernels.base import Kernel, Packed, PackedLayout, PackedTensor, StoredWeight, WeightSpec
from quantport.numerics.by_rows import QuantizedRows, join_steps, rows_of_step
from quantport.numerics.elements import bits
from quantport.scheme.scheme import INPUT_SCALE


def layout_of(kernel: Kernel, spec: WeightSpec) -> PackedLayout | None:
    """What ``kernel.packed_layout`` answers.

    Raises:
        BackendError: it raises or returns nonsense, and is named.
    """
    try:
        layout = kernel.packed_layout(spec)
        if not isinstance(layout, PackedLayout | None):
            raise TypeError(f"it is {layout!r}: return a PackedLayout, or None")
    except (Exception, SystemExit) as error:  # a stranger's code
        raise BackendError(
            f"the packed layout of {spec.scheme.name} [{spec.n}, {spec.k}] by kernel {kernel.name}",
            f"{type(error).__name__}: {error}",
            "a version of its backend that answers, or another device",
        ) from error
    return layout


def pack_steps(kernel: Kernel, spec: WeightSpec, steps: Iterable[QuantizedRows], name: str = "") -> Packed:
    """Packs a weight that comes some rows at a time. Where the kernel packs by rows, one step is held beside
    what is packed; else the whole stored weight is.

    Args:
        kernel: The kernel.
        spec: Scheme and shape of the whole weight.
        steps: All its rows, in order; a step begins at a multiple of ``kernel.packed_layout(spec).block``.
        name: Of the weight, for errors.

    Raises:
        WeightError: a stored tensor is missing, or has another shape or dtype than ``Scheme.layout`` says.
    """
    steps = iter(steps)
    first = next(steps)
    alone = first.stop == spec.n
    layout = None if alone else layout_of(kernel, spec)
    if layout is None:
        every = first.stored if alone else join_steps(chain((first,), steps), spec.scheme, (spec.n, spec.k))
        check_stored(every, spec, name)
        return kernel.pack(every, spec)
    packed: Packed = ()
    steps = chain((first,), steps)
    del first  # each step is let go of once it is packed
    for start, stop, stored_weight in steps:
        check_stored(stored_weight, replace(spec, n=stop - start), name)
        part = kernel.pack(stored_weight, replace(spec, n=stop - start))
        packed = packed or tuple(map(_whole, layout.tensors, part))
        for whole, rows, (along, offset) in zip(packed, part, _places(kernel, spec, start), strict=True):
            if along is not None:
                bits(whole).narrow(along, offset, rows.shape[along]).copy_(bits(rows))
    return packed


def unpack_steps(kernel: Kernel, packed: Packed, spec: WeightSpec, elements: int) -> Iterator[QuantizedRows]:
    """The stored tensors of a packed weight: of about so many elements at a time where the kernel packs by
    rows, else of the whole weight.
    """
    layout = layout_of(kernel, spec)
    rows = rows_of_step(spec.scheme, spec.n, spec.k, elements, layout.block) if layout else spec.n
    if rows >= spec.n:
        yield QuantizedRows(0, spec.n, kernel.unpack(packed, spec))
        return
    for start in range(0, spec.n, rows):
        stop = min(start + rows, spec.n)
        places = zip(_places(kernel, spec, start), _places(kernel, spec, stop), strict=True)
        part = tuple(
            whole if along is None else whole.narrow(along, first, last - first)
            for whole, ((along, first), (_, last)) in zip(packed, places, strict=True)
        )
        yield QuantizedRows(start, stop, kernel.unpack(part, replace(spec, n=stop - start)))


def check_stored(stored_weight: StoredWeight, spec: WeightSpec, name: str) -> None:
    """Refuses what are not the tensors that a scheme stores, or a scale of activations that is none.

    Raises:
        WeightError: names the weight.
    """
    layout = spec.scheme.layout(spec.n, spec.k)
    found = {key: (tuple(t.shape), t.dtype) for key, t in stored_weight.items()}
    if found != layout:
        raise WeightError(
            f"weight {name or 'of a linear layer'} as {spec.scheme.name}", f"tensors {found}", f"{layout}"
        )
    scale = stored_weight.get(INPUT_SCALE)
    if scale is not None and not scale.is_meta and not 0 < scale.item() < math.inf:
        raise WeightError(
            f"weight {name or 'of a linear layer'} as {spec.scheme.name}",
            f"{INPUT_SCALE} {scale.item():g}",
            "a finite scale above 0",
        )


def _whole(expected: PackedTensor, part: Tensor) -> Tensor:
    """Room for all rows of what some rows were packed into; that itself where all rows share it."""
    if expected.rows is None:
        return part
    return empty_weight(expected.shape, expected.dtype, part.device)


def _places(kernel: Kernel, spec: WeightSpec, row: int) -> list[tuple[int | None, int]]:
    """For each packed tensor the dimension of its rows, and where those from ``row`` on begin."""
    before = kernel.packed_layout(replace(spec, n=row))
    assert before is not None  # as for all rows
    return [(t.rows, 0 if t.rows is None else t.shape[t.rows]) for t in before.tensors]
