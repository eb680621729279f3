"""Block-Hadamard rotation along K: spreads outliers over their block before weights are quantized.

A block of the largest power of two that divides K, up to the scheme's, is multiplied by the Sylvester-Hadamard matrix over
the square root of its size: orthogonal and its own inverse, so that ``(x H)(W H)^T = x W^T``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _hadamard(size: int, device: torch.device) -> Tensor:
    h = torch.full((1, 1), 1 / math.sqrt(size), device=device)
    while h.shape[0] < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def rotate(x: Tensor, block: int) -> Tensor:
    """Rotates the last dimension.

    Args:
        x: ``[..., k]``, any floating dtype.
        block: Largest size of a Hadamard block, a power of two; 0 leaves x as it is.

    Returns:
        The shape and dtype of x, computed in fp32. Applied twice it gives x back, up to rounding.
    """
    k = x.shape[-1]
    size = math.gcd(block, k) if block else 1
    if size <= 1 or not x.numel():
        return x
    blocks = x.reshape(-1, k // size, size).float()
    return (blocks @ _hadamard(size, x.device)).to(x.dtype).view(x.shape)
