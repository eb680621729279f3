"""Triton kernels run in Triton's interpreter in every test: it is asked for before anything can import them.

Accelerators' ``_int_mm`` is exact. The host's stands for it, and saturates where oneDNN has no VNNI: there an exact one takes its
place.
"""

import os
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import torch

_LARGEST = torch.full((32, 64), 127, dtype=torch.int8)
_ATEN = torch.library.Library("aten", "IMPL")


def _int_mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.dtype is not torch.int8 or right.dtype is not torch.int8:
        raise RuntimeError(f"expected int8 and int8, not {left.dtype} and {right.dtype}")
    return torch.mm(left.double(), right.double()).to(torch.int32)


if (torch._int_mm(_LARGEST, _LARGEST.t()) != 64 * 127 * 127).any():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the host's is replaced
        _ATEN.impl("_int_mm", _int_mm, "CPU")
