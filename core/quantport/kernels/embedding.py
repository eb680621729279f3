"""Embeddings: a weight whose rows are looked up, not multiplied. Which schemes and kernels can do that."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from quantport import numerics
from quantport.kernels.base import Kernel, Packed, WeightSpec
from quantport.kernels.verdict import Status
from quantport.scheme import Scheme

_MANY = 1 << 20


@cache
def rows_of(scheme: Scheme, k: int) -> tuple[bool, ...] | str:
    """For each stored tensor, whether it has one leading entry per row (else it is one for all rows); or why
    it has neither.
    """
    one, many = scheme.layout(1, k), scheme.layout(_MANY, k)
    out = []
    for name, (shape, _) in many.items():
        small = one[name][0]
        by_row = shape[:1] == (_MANY,) and small[:1] == (1,) and shape[1:] == small[1:]
        if not by_row and shape != small:
            return (
                f"{name} is stored for several rows at a time ({scheme.weight}), so that no row can be "
                "looked up alone"
            )
        out.append(by_row)
    return tuple(out)


def why_not_rows(scheme: Scheme, k: int) -> str:
    """Why the rows of a weight of this scheme cannot be looked up, or an empty string."""
    if scheme.weight.format == "bf16":
        return "an embedding that is not quantized stays as it is"
    found = rows_of(scheme, k)
    return found if isinstance(found, str) else ""


def look_up(kernel: Kernel, ids: Tensor, packed: Packed, spec: WeightSpec, dtype: torch.dtype) -> Tensor:
    """Dequantizes the rows that are asked for, and no others.

    Args:
        kernel: One that ``embedding_kernels`` lets pass.
        ids: Integer, any shape.
        packed: What ``kernel.pack`` returned.
        spec: Scheme and shape ``[n, k]``.
        dtype: Of the result.

    Returns:
        ``[*ids.shape, k]``.
    """
    by_row = rows_of(spec.scheme, spec.k)
    flat = ids.reshape(-1)
    selected = tuple(
        numerics.bits(t).index_select(0, flat).view(t.dtype) if row else t
        for t, row in zip(packed, by_row, strict=True)
    )
    some = WeightSpec(spec.scheme, flat.numel(), spec.k)
    return numerics.dequantize_weight(kernel.unpack(selected, some), spec.scheme, spec.k, dtype).view(
        *ids.shape, spec.k
    )


def embedding_kernels(kernels: Sequence[Kernel], multiplied: bool) -> list[Kernel]:
    """The kernels that a table of rows may have: they keep the stored layout; ``multiplied``: an output head
    shares it.
    """
    return [k for k in kernels if k.keeps_layout and (multiplied or k.status is Status.DEQUANTIZE)]
