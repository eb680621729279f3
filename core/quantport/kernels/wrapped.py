"""Kernels that prepare activations for another one, which multiplies the stored weight as it knows it: in
activation order, or with a stored scale of activations.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from quantport.errors import UnsupportedError
from quantport.kernels.base import (
    CodedRows,
    Kernel,
    Packed,
    PackedLayout,
    PackedTensor,
    Request,
    RowFunction,
    StoredWeight,
    WeightSpec,
)
from quantport.kernels.verdict import Claim, Reason
from quantport.numerics import dequantize_weight, quantize_static
from quantport.numerics.by_rows import stored_slices
from quantport.numerics.sharding import alignment
from quantport.scheme import Scheme
from quantport.scheme.scheme import INPUT_SCALE, INPUT_ZERO, ORDER

_ROWS = 256  # of a weight that are decoded at a time, to be summed up


def kernel_for(kernel: Kernel, scheme: Scheme) -> Kernel:
    """What runs the weights of a scheme: the kernel itself, or one that prepares activations for it, the same
    for all modules.

    Raises:
        UnsupportedError: it quantizes activations, and takes no scale that is stored.
    """
    if scheme.static and not kernel.reads_input_scale:
        if kernel.quantizes_activations and not kernel.takes_codes:
            found = "it finds the scales of activations by itself"
            raise UnsupportedError(f"run {scheme.name} by {kernel.name}", found, "a kernel that accepts it")
        kind = _Static if kernel.takes_codes else _Unused
        kernel = _WRAPPED.setdefault((id(kernel), kind), kind(kernel))
    if scheme.ordered:
        kernel = _WRAPPED.setdefault((id(kernel), _Ordered), _Ordered(kernel))
    return kernel


class _Wrapped(Kernel):
    """A kernel whose packed weights are those of another one, followed by what it needs itself."""

    def __init__(self, kernel: Kernel) -> None:
        self.of = kernel
        self.name, self.status, self.tolerance = kernel.name, kernel.status, kernel.tolerance
        self.numeric_deviation, self.layers = kernel.numeric_deviation, kernel.layers
        self.quantizes_activations = kernel.quantizes_activations

    @abstractmethod
    def inner(self, spec: WeightSpec) -> WeightSpec:
        """The weight as the other kernel knows it."""

    @abstractmethod
    def further(self, spec: WeightSpec) -> Mapping[str, PackedTensor]:
        """The stored tensors that follow what that one packs."""

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        return self.of.reasons_against(replace(request, weight=self.inner(request.weight)))

    def claim(self, request: Request) -> Claim:
        return self.of.claim(replace(request, weight=self.inner(request.weight)))

    @property
    def keeps_layout(self) -> bool:
        return self.of.keeps_layout

    def packed_layout(self, spec: WeightSpec) -> PackedLayout | None:
        layout = self.of.packed_layout(self.inner(spec))
        further = self.further(spec).values()
        return None if layout is None else layout._replace(tensors=(*layout.tensors, *further))

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        own = self.further(spec)
        plain = {key: tensor for key, tensor in stored_weight.items() if key not in own}
        return *self.of.pack(plain, self.inner(spec)), *(stored_weight[key] for key in own)

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        of, own = self.split(packed, spec)
        return {**self.of.unpack(of, self.inner(spec)), **own}

    def split(self, packed: Packed, spec: WeightSpec) -> tuple[Packed, StoredWeight]:
        """What the other kernel packed, and the further tensors."""
        further = self.further(spec)
        count = len(packed) - len(further)
        return packed[:count], dict(zip(further, packed[count:], strict=True))


class _Ordered(_Wrapped):
    """A kernel whose packed weights end with the order of their columns: int32 ``[k]``."""

    def inner(self, spec: WeightSpec) -> WeightSpec:
        return replace(spec, scheme=spec.scheme.in_order)

    def further(self, spec: WeightSpec) -> Mapping[str, PackedTensor]:
        return {ORDER: PackedTensor((spec.k,), torch.int32, None)}

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        return self.of.run(x.index_select(1, packed[-1]), packed[:-1], bias, self.inner(spec))

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        """As of the kernel; a rotation is one of ordered inputs."""
        return self.of.apply(x.index_select(1, packed[-1]), packed[:-1], bias, self.inner(spec))


class _Unused(_Wrapped):
    """A kernel that leaves activations in 16 bits: their scale is kept beside the weight."""

    def inner(self, spec: WeightSpec) -> WeightSpec:
        return _per_token(spec)

    def further(self, spec: WeightSpec) -> Mapping[str, PackedTensor]:
        return _of_inputs(spec.scheme)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        return self.of.run(x, self.split(packed, spec)[0], bias, self.inner(spec))

    def row_function(self, packed: Packed, spec: WeightSpec) -> RowFunction | None:
        return self.of.row_function(self.split(packed, spec)[0], self.inner(spec))


class _Static(_Unused):
    """A kernel that multiplies codes of activations, whose scale is stored.

    Where there is a zero point, what it adds to the products is packed before all else: fp32 ``[n]``.
    """

    def packed_layout(self, spec: WeightSpec) -> PackedLayout | None:
        layout = super().packed_layout(spec)
        if layout is None or INPUT_ZERO not in self.further(spec):
            return layout
        return layout._replace(tensors=(PackedTensor((spec.n,), torch.float32, 0), *layout.tensors))

    @property
    def keeps_layout(self) -> bool:
        return False

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        packed = super().pack(stored_weight, spec)
        if INPUT_ZERO not in stored_weight:
            return packed
        return _added(stored_weight, spec), *packed

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        return super().unpack(packed[INPUT_ZERO in self.further(spec) :], spec)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        assert spec.scheme.activation is not None  # it has a stored scale
        has_zero = INPUT_ZERO in self.further(spec)
        of, own = self.split(packed[has_zero:], spec)
        codes, token = quantize_static(x, spec.scheme.activation, own[INPUT_SCALE], own.get(INPUT_ZERO))
        if has_zero:
            bias = -packed[0] if bias is None else bias - packed[0]
        return self.of.run_codes(CodedRows(codes, token.contiguous(), x.dtype), of, bias, self.inner(spec))

    def row_function(self, packed: Packed, spec: WeightSpec) -> RowFunction | None:
        return None


@lru_cache(maxsize=1024)
def _per_token(spec: WeightSpec) -> WeightSpec:
    return replace(spec, scheme=spec.scheme.per_token)


@lru_cache(maxsize=256)
def _of_inputs(scheme: Scheme) -> Mapping[str, PackedTensor]:
    layout = scheme.layout(1, 1)
    return {key: PackedTensor(*layout[key], None) for key in (INPUT_SCALE, INPUT_ZERO) if key in layout}


def _added(stored_weight: StoredWeight, spec: WeightSpec) -> Tensor:
    """What the zero point of activations adds to each product: fp32 ``[n]``."""
    plain, k = spec.scheme.per_token.weight_only, spec.k
    zero, scale = stored_weight[INPUT_ZERO], stored_weight[INPUT_SCALE]
    if plain.weight.plain and plain.weight.element.bits == 8 and not plain.weight.group_size:
        # as most kernels compute it: then a token of zeros gives zeros
        sums = stored_weight["weight"].sum(1, dtype=torch.int32) * zero.int()
        return sums.float() * scale * stored_weight["weight_scale"].float().view(-1)
    out = torch.empty(spec.n, dtype=torch.float32, device=zero.device)
    step = math.lcm(_ROWS, alignment(plain, 0))
    for start in range(0, spec.n, step):
        rows = stored_slices(plain, k, start, min(start + step, spec.n))
        some = {key: stored_weight[key][rows[key] or slice(None)] for key in rows}
        out[start : start + step] = dequantize_weight(some, plain, k).sum(1)
    return out.mul_(zero).mul_(scale)


# By the identity of kernels, which they hold: as long as a module runs one.
_WRAPPED: WeakValueDictionary[tuple[int, type[_Wrapped]], _Wrapped] = WeakValueDictionary()
