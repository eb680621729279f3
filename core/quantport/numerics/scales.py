"""Scales: from the largest magnitude of a block to the stored scale, by rule; and from the stored scale back
to fp32.

Rules of power-of-two (e8m0) scales, for an element whose largest value is ``max = 1.f * 2**emax``:

* ``floor``: ``2**(floor(log2 amax) - emax)``, of the OCP MX specification v1.0. Values above ``max``
saturate.
* ``even``: as ``floor``, after rounding amax half up to the mantissa bits of the element. torchao calls it
EVEN.
* ``even1``: as ``even``, with one mantissa bit whatever the element: what compressed-tensors does for mxfp8.
* ``ceil``: ``2**(ceil(log2 amax) - emax)``: nothing saturates, up to one bit is wasted. torchao calls it
CEIL.
* ``rceil``: ``amax / max``, rounded up to a power of two: the smallest scale that saturates nothing; the
conversion
  instruction of Blackwell (``cvt.rp.satfinite.ue8m0x2``). torchao calls it RCEIL.

Every result is clamped to [2**-127, 2**(127 - emax)], so that ``max`` times the scale is finite: the OCP rule
gets no further. A block of zeros gets 2**-127, a NaN or Inf gets 255 (NaN).
Every other scale is ``amax / half_range``, rounded to the scale's format to nearest even; 0 becomes
``2**-23`` (e4m3fn: 0.125), as in compressed-tensors ``calculate_qparams``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantport.numerics.elements import decode, encode
from quantport.scheme import Quant
from quantport.scheme.formats import E4M3FN, E8M0, FORMATS, Format

EPS = 2.0**-23
EPS_E4M3FN = 0.125
TINY = torch.finfo(torch.float32).tiny
_MANTISSA = (1 << 23) - 1


def scale_of(amax: Tensor, quant: Quant) -> Tensor:
    """Stored scale of each block.

    Args:
        amax: Largest magnitudes, fp32, not negative.
        quant: Element format, scale format and rule.

    Returns:
        Scales of ``quant.scale_dtype``, in the shape of ``amax``; NaN where amax is NaN or Inf.
    """
    if quant.scale == E8M0.name:
        return e8m0_of(amax, quant.element, "floor" if quant.searched else quant.rule)
    return stored(over(amax, quant.element.half_range), quant.scale)


def over(x: Tensor, number: float) -> Tensor:
    """``x / number``, rounded once on every device: on GPUs torch multiplies by the reciprocal of a Python
    number.
    """
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


def global_factor(amax: Tensor, element: Format) -> Tensor:
    """What e4m3fn scales are multiplied with: ``448 * high / amax``, rounded once; 1 where that overflows.

    Args:
        amax: Largest magnitudes, fp32, not negative.
        element: The element format.
    """
    most = torch.full_like(amax, E4M3FN.high * element.high)  # a Python number would be times the reciprocal
    factor = most / amax.clamp_min(TINY)
    return torch.where(torch.isposinf(factor), 1.0, factor)


def stored(scale: Tensor, name: str) -> Tensor:
    """Rounds fp32 scales to a format, saturating; 0 becomes the smallest usable scale of that format."""
    element = FORMATS[name]
    if element.is_float8:
        scale = decode(encode(scale.clone(), element), element)
        return encode(torch.where(scale == 0, EPS_E4M3FN, scale), element)
    if element.storage is not torch.float32:
        scale = scale.to(element.storage).float()
    return torch.where(scale == 0, EPS, scale).to(element.storage)


def scale_values(scale: Tensor, name: str) -> Tensor:
    """The inverse of storing: fp32 values of stored scales."""
    return decode(scale, FORMATS[name])


def e8m0_of(amax: Tensor, element: Format, rule: str) -> Tensor:
    """Power-of-two scale of each block: biased exponents, uint8.

    Args:
        amax: fp32, not negative.
        element: The element format.
        rule: ``floor``, ``even``, ``even1``, ``ceil`` or ``rceil``.
    """
    emax = math.frexp(element.high)[1] - 1
    if rule == "rceil":
        ratio = over(amax, element.high).view(torch.int32)
        # up to 2**-127, the smallest scale
        exponent = torch.where(ratio <= 1 << 22, 0, ratio + _MANTISSA) >> 23
    else:
        up = {"ceil": _MANTISSA, "even": 1 << (22 - element.mantissa), "even1": 1 << 21}.get(rule, 0)
        exponent = ((amax.view(torch.int32) + up) >> 23) - emax
    exponent = exponent.clamp_(0, 254 - emax)
    return torch.where(torch.isfinite(amax), exponent, 255).to(torch.uint8)
