"""Scales that are searched for, without data: least squared error of the weight itself.

Every sum over a block is a fold of halves (``fold``), elementwise additions in a fixed order, so that a fast
path can equal it bit for bit.

Sources: HQQ, https://mobiusml.github.io/hqq_blog/ (the half-quadratic solver); the rest is plain least
squares.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from quantport.numerics.elements import encode, rounded
from quantport.numerics.scales import EPS, e8m0_of, over, scale_values, stored
from quantport.scheme import Quant

# tried ends of the range of a block: 3, each 0.8 / top further from its extreme towards its middle
ENDS, CLIP = (
    3,
    0.8,
)
REFITS = 1
HQQ_STEPS, HQQ_NORM, HQQ_BETA, HQQ_GROWTH = 20, 0.7, 10.0, 1.01


def fold(x: Tensor) -> Tensor:
    """Sum over the last dimension, whose size is padded with zeros to a power of two: halves are added until
    one is left.
    """
    size = x.shape[-1]
    if size & (size - 1):
        x = torch.nn.functional.pad(x, (0, (1 << size.bit_length()) - size))
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def with_offset(x: Tensor, quant: Quant) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes blocks with a scale and an offset: ``value = code * scale + zero``.

    Args:
        x: fp32 ``[R, C, g]``.
        quant: int4, uint4 or int8 with rule ``mse`` or ``hqq``, or ``amax``: from the smallest to the largest
            value and over zero, which is a code.

    Returns:
        Codes int8 ``[R, C, g]``, scale and zero ``[R, C]`` of ``quant.scale_dtype``.
    """
    low, high = x.amin(-1), x.amax(-1)
    top = quant.element.high - quant.element.low
    if quant.rule == "amax":
        return _over_range(x, low, high, quant)
    scale, zero = (least_squares_grid if quant.rule == "mse" else _hqq)(x, low, high, top)
    zero = (zero - quant.element.low * scale).to(quant.scale_dtype)
    scale = stored(scale, quant.scale)
    codes = (x - zero.float()[..., None]).div_(scale.float()[..., None])
    return encode(codes, quant.element), scale, zero


def _over_range(x: Tensor, low: Tensor, high: Tensor, quant: Quant) -> tuple[Tensor, Tensor, Tensor]:
    """Codes on a grid from the smallest value to the largest that has a zero: its offset is a whole number of
    scales, as the zero points of other quantizers are.
    """
    element = quant.element
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = stored((high - low) / (element.high - element.low), quant.scale)
    zero_point = torch.round(element.low - low / scale.float()).clamp_(element.low, element.high)
    zero = (-zero_point * scale.float()).to(quant.scale_dtype)
    codes = encode(x.div_(scale.float()[..., None]).round_().add_(zero_point[..., None]), element)
    return codes, scale, zero


def _codes(x: Tensor, low: Tensor, scale: Tensor, top: float) -> Tensor:
    """Codes 0..top on the grid that starts at ``low``, as fp32. A search may multiply by the inverse; final
    codes divide.
    """
    return (x - low[..., None]).mul_((1 / scale)[..., None]).round_().clamp_(0, top)


def _fit(x: Tensor, q: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares of x on q: slope, intercept and the explained sum of squares, per block. NaN where q is
    constant.
    """
    sq, sqq, sx = fold(q), fold(q * q), fold(x)
    covariance, variance = fold(q * x) - over(sq * sx, size), sqq - over(sq * sq, size)
    slope = covariance / variance
    return slope, over(sx - slope * sq, size), covariance * slope


def least_squares_grid(x: Tensor, low: Tensor, high: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """Tries clipped ranges, keeps the grid whose least-squares line explains most, and refits it.

    Args:
        x: fp32 blocks ``[..., g]``.
        low: Smallest value of each block, or what the grid shall begin with.
        high: Largest value of each block.
        top: Largest code; the smallest is 0.

    Returns:
        Scale and offset of each block: value = code * scale + offset.
    """
    size = x.shape[-1]
    middle, reach = low / 2 + high / 2, high / 2 - low / 2
    x = x - middle[..., None]
    best = torch.zeros_like(low)
    scale, zero = over(reach, top) * 2, -reach
    ends = [1 - i * CLIP / top for i in range(ENDS)]
    for down, up in product(ends, ends):
        start, step = -reach * down, over(reach, top) * (down + up)
        slope, intercept, explained = _fit(x, _codes(x, start, step, top), size)
        # squares beyond fp32: the grid of min and max stays
        better = (explained > best) & (explained < torch.inf)
        best = torch.where(better, explained, best)
        scale, zero = torch.where(better, slope, scale), torch.where(better, intercept, zero)
    for _ in range(REFITS):
        slope, intercept, explained = _fit(x, _codes(x, zero, scale, top), size)
        better = (explained > best) & (explained < torch.inf)
        scale, zero = torch.where(better, slope, scale), torch.where(better, intercept, zero)
    return scale, zero + middle


def _hqq(x: Tensor, low: Tensor, high: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """Half-quadratic quantization: the scale of min and max; offsets that minimize ``|error|**0.7``, step by
    step.
    """
    scale = torch.where(high > low, over(high, top) - over(low, top), EPS)
    zero, beta = low, HQQ_BETA
    best, kept = torch.full_like(low, torch.inf), low
    for _ in range(HQQ_STEPS):
        line = _codes(x, zero, scale, top) * scale[..., None]
        error = x - line - zero[..., None]
        total = fold(error.abs())
        kept = torch.where(total < best, zero, kept)
        best = torch.minimum(total, best)
        size = error.abs()
        shrunk = error.sign() * (size - over(size.pow(HQQ_NORM - 1), beta)).clamp_min_(0)
        zero = over(fold(x - shrunk - line), x.shape[-1])
        beta *= HQQ_GROWTH
    return scale, torch.where(torch.isfinite(low / 2 + high / 2), kept, torch.nan)


def outer(x: Tensor, first: Tensor, quant: Quant) -> Tensor:
    """Best outer scale of each row of blocks under power-of-two inner scales: an octave in eighths, from
    ``first`` down.

    Args:
        x: fp32 ``[R, C, outer]``.
        first: fp32 ``[R, C]``.
        quant: The Quant, whose inner blocks divide the outer ones.
    """
    best, kept = torch.full_like(first, torch.inf), first
    for i in range(8):
        candidate = first * 2.0 ** (-i / 8)
        inner = (x / candidate[..., None]).view(*x.shape[:-1], -1, quant.group_size)
        step = scale_values(e8m0_of(inner.abs().amax(-1), quant.element, "even"), quant.scale)[..., None]
        value = (rounded(inner / step, quant.element) * step).view(x.shape)
        total = fold((x - value * candidate[..., None]).square_())
        kept, best = torch.where(total < best, candidate, kept), torch.minimum(total, best)
    return kept


def scale(x: Tensor, first: Tensor, quant: Quant, factor: Tensor | None = None) -> Tensor:
    """Best of the neighbours of a first scale: e8m0 from one below to one above; e4m3fn from 3 codes below to
    6 above.

    Args:
        x: fp32 ``[R, C, g]``.
        first: Scales of the rule, ``[R, C]``, uint8 or float8_e4m3fn.
        quant: The Quant, of elements with a sign.
        factor: Global factor of NVFP4, as in ``blocks``.

    Returns:
        Scales of the least squared error; of equal ones the nearest to ``first``, the smaller first.
    """
    power = quant.scale == "e8m0"
    start = first.view(torch.uint8).int()
    steps = (0, -1, 1) if power else (0, -1, 1, -2, 2, -3, 3, 4, 5, 6)
    best, kept = torch.full(first.shape, torch.inf, dtype=torch.float32, device=x.device), start
    for step in steps:
        code = (start + step).clamp_(0 if power else 1, 254 if power else 126)
        candidate = code.to(torch.uint8).view(first.dtype)
        divisor = scale_values(candidate, quant.scale)
        divisor = (divisor if factor is None else divisor / factor.view(-1, 1))[..., None]
        value = rounded(x / divisor, quant.element) * divisor
        total = fold((x - value).square_())
        better = total < best
        kept, best = torch.where(better, code, kept), torch.where(better, total, best)
    finite = torch.isfinite(scale_values(first, quant.scale))
    return torch.where(finite, kept, start).to(torch.uint8).view(first.dtype)
