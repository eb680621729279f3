"""Block-Hadamard rotation along K: spreads outliers over their block before weights are quantized.

A block of the largest power of two that divides K, up to the scheme's, is multiplied by the
Sylvester-Hadamard matrix over the square root of its size: orthogonal and its own inverse, so that ``(x H)(W
H)^T = x W^T``. The fast Walsh-Hadamard transform multiplies by ``1 / sqrt(size)``, then adds and subtracts
neighbours 1, 2, 4, ... apart, in this order: no matmul, so that a row has the same bits on every device and
in every batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
    h, step = x.reshape(-1, size).float() * (1 / math.sqrt(size)), 1
    while step < size:
        a, b = h.view(-1, size // (2 * step), 2, step).unbind(2)
        h, step = torch.stack((a + b, a - b), 2), 2 * step
    return h.reshape(x.shape).to(x.dtype)
