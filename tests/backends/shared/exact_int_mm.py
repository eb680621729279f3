"""``_int_mm`` of accelerators is exact. In their tests the host's stands for it, which saturates where oneDNN
has no VNNI.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def _int_mm(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype is not torch.int8 or right.dtype is not torch.int8:
        raise RuntimeError(f"expected int8 and int8, not {left.dtype} and {right.dtype}")
    return torch.mm(left.double(), right.double()).to(torch.int32)


def saturates() -> bool:
    """Whether the host's operator is not exact."""
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.t()) != 64 * 127 * 127).any())


@contextmanager
def exact_int_mm() -> Iterator[None]:
    """Replaces the host's operator inside by an exact one, where it saturates."""
    if not saturates():
        yield
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the host's is replaced
        library.impl("_int_mm", _int_mm, "CPU")
    try:
        yield
    finally:
        library._destroy()
