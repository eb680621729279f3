"""Other projects' implementations, as judges: imported quietly, and skipped where this Python or torch is too
old for them.
"""

from __future__ import annotations

import logging
import warnings
from types import ModuleType

import pytest
import torch
from torch import Tensor

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def peer(name: str) -> ModuleType:
    """Imports a peer's module: what it has to say about itself on import is no failure of ours."""
    if TORCH < (2, 10):
        pytest.skip("the versions that are compared with need torch 2.10")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            return pytest.importorskip(name, exc_type=ImportError)
        finally:
            logging.disable(logging.NOTSET)


def normal(n: int, k: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    """Weights ``[n, k]`` whose rows have different sizes: fp32 normal times log-normal."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=random) * torch.exp(spread * torch.randn(n, 1, generator=random))


def patterns(count: int, seed: int = 0) -> Tensor:
    """Random bit patterns of fp32: every magnitude down to subnormals, zeros, NaN and Inf among them."""
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randint(-(2**31), 2**31, (count,), generator=random, dtype=torch.int64)
        .to(torch.int32)
        .view(torch.float32)
    )


def raw(x: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return x.contiguous().view(-1).view(torch.uint8)
