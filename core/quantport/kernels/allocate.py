"""Memory for tensors that stay: weights."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import torch
from torch import Tensor

_HUGE = 2 << 20  # bytes of a huge page, of x86 and of Arm with pages of 4 KiB
_LEAST = 4 * _HUGE  # a tensor that is smaller is left alone


def empty_weight(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor that will be filled whole, and stays.

    On Linux a large one on the CPU is in huge pages, where the system leaves that to programs
    (``transparent_hugepage/enabled`` is ``madvise``): filling it takes a fault for 2 MiB and not for each 4
    KiB, and reading it fewer entries of the TLB. Source: madvise(2), MADV_HUGEPAGE.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    advise = _madvise()
    size = out.numel() * out.element_size()
    if advise is not None and type(out) is Tensor and out.is_cpu and size >= _LEAST:
        start = out.data_ptr()
        first, last = -(-start // _HUGE) * _HUGE, (start + size) // _HUGE * _HUGE
        advise(first, last - first, mmap.MADV_HUGEPAGE)  # where it is refused, pages stay small
    return out


@cache
def _madvise() -> Any:
    """The function of the C library; None where there is none, or it knows no huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
