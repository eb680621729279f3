"""Reused buffers: the page faults of a fresh large buffer cost more than the arithmetic on it."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

_local = threading.local()


def scratch(dtype: torch.dtype, rows: int, cols: int) -> Tensor:
    """An uninitialized ``[rows, cols]`` buffer of this thread, valid until the next call with the same dtype."""
    buffers: dict[Any, Tensor] = _local.__dict__
    size = rows * cols
    if dtype not in buffers or buffers[dtype].numel() < size:
        fresh = torch.empty(size, dtype=dtype, device="cpu")
        if type(fresh) is not Tensor:  # a fake tensor of a trace must not outlive it
            return fresh.view(rows, cols)
        buffers[dtype] = fresh
    return buffers[dtype][:size].view(rows, cols)
