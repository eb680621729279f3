"""Reused buffers: the page faults of a fresh large buffer cost more than the arithmetic on it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_local = threading.local()


def scratch(near: Tensor, dtype: torch.dtype, rows: int, cols: int) -> Tensor:
    """An uninitialized ``[rows, cols]`` buffer of this thread, valid until the next call with the same dtype.

    Where ``near`` is a fake or meta tensor it is a fresh one of that kind, which must not outlive the trace.
    """
    size = rows * cols
    if type(near) is not Tensor or not near.is_cpu:
        return torch.empty(rows, cols, dtype=dtype, device=near.device)
    buffers: dict[torch.dtype, Tensor] = _local.__dict__.setdefault("buffers", {})
    if dtype not in buffers or buffers[dtype].numel() < size:
        with torch.inference_mode(False):  # a buffer that was made inside could not be written outside of it
            buffers[dtype] = torch.empty(size, dtype=dtype, device="cpu")
    return buffers[dtype][:size].view(rows, cols)
