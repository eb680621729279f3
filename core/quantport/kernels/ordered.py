"""Weights in activation order: a kernel multiplies columns as they are stored, by inputs brought into their
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from quantport.kernels.base import (
    Kernel,
    Packed,
    PackedLayout,
    PackedTensor,
    Request,
    StoredWeight,
    WeightSpec,
)
from quantport.kernels.verdict import Claim, Reason
from quantport.scheme import Scheme
from quantport.scheme.scheme import ORDER


def kernel_for(kernel: Kernel, scheme: Scheme) -> Kernel:
    """What runs the weights of a scheme: the kernel itself, or one that orders its inputs first, the same for
    all modules.
    """
    return _ORDERED.setdefault(id(kernel), _Ordered(kernel)) if scheme.ordered else kernel


class _Ordered(Kernel):
    """A kernel whose packed weights end with the order of their columns: int32 ``[k]``."""

    def __init__(self, kernel: Kernel) -> None:
        self.of = kernel
        self.name, self.status, self.tolerance = kernel.name, kernel.status, kernel.tolerance
        self.numeric_deviation, self.layers = kernel.numeric_deviation, kernel.layers
        self.quantizes_activations = kernel.quantizes_activations

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        return self.of.reasons_against(replace(request, weight=_in_order(request.weight)))

    def claim(self, request: Request) -> Claim:
        return self.of.claim(replace(request, weight=_in_order(request.weight)))

    @property
    def keeps_layout(self) -> bool:
        return self.of.keeps_layout

    def packed_layout(self, spec: WeightSpec) -> PackedLayout | None:
        layout = self.of.packed_layout(_in_order(spec))
        order = PackedTensor((spec.k,), torch.int32, None)
        return None if layout is None else layout._replace(tensors=(*layout.tensors, order))

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        plain = {key: tensor for key, tensor in stored_weight.items() if key != ORDER}
        return *self.of.pack(plain, _in_order(spec)), stored_weight[ORDER]

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        return {**self.of.unpack(packed[:-1], _in_order(spec)), ORDER: packed[-1]}

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        return self.of.run(x.index_select(1, packed[-1]), packed[:-1], bias, _in_order(spec))

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        """As of the kernel; a rotation is one of ordered inputs."""
        return self.of.apply(x.index_select(1, packed[-1]), packed[:-1], bias, _in_order(spec))


# By the identity of kernels, which they hold: as long as a module runs one.
_ORDERED: WeakValueDictionary[int, _Ordered] = WeakValueDictionary()


def _in_order(spec: WeightSpec) -> WeightSpec:
    return replace(spec, scheme=spec.scheme.in_order)
