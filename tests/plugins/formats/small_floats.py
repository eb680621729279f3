"""Checkpoints of small floats by hand: codes, scales, and what they stand for, for formats without a maker
that runs here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantport import numerics
from quantport.scheme.catalog import BUILTIN

E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = torch.cat((E2M1, -E2M1))


def codes_of(packed: Tensor) -> Tensor:
    """Values of 4-bit floats, two to a byte, the first in its low bits."""
    return E2M1[torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()]


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes ``[n, k / 2]``, exponents ``[n, k / 32]``, and values: ``e2m1 * 2 ** (exponent - 127)``."""
    stored = numerics.quantize_weight(weight, BUILTIN["mxfp4"])
    packed, exponents = stored["weight_packed"], stored["weight_scale"]
    scale = torch.exp2(exponents.float() - 127)
    return packed, exponents, codes_of(packed) * scale.repeat_interleave(32, 1)


def mxfp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[n, k]``, exponents ``[n, k / 32]``, and values."""
    stored = numerics.quantize_weight(weight, BUILTIN["mxfp8"])
    codes, exponents = stored["weight"], stored["weight_scale"]
    scale = torch.exp2(exponents.float() - 127)
    return codes, exponents, codes.float() * scale.repeat_interleave(32, 1)
