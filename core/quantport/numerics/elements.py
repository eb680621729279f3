"""Elements: fp32 values to codes and back, exactly. Every function is elementwise and vectorized.

All formats round to the nearest code, ties to the even one (code books: ties to the lower value), and
saturate: what is beyond the largest value, infinities included, becomes the largest value. Subnormals are
kept, and so is the sign of zero where the format has one. NaN stays NaN in the 8-bit float formats; the
others have no NaN: it gets any of their codes.

Devices outside of PyTorch's own tree need not convert float8 (Ascend's Cast does on its newest product only),
nor copy it: there its bytes are computed as those of smaller floats are, and nothing but views makes them
float8. Some need not read bf16 either: there it is the upper half of an fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantport.numerics.codebooks import codebook, lookup, nearest
from quantport.numerics.packing import computes_here
from quantport.scheme.formats import BF16, E8M0, FORMATS, Format


def encode(x: Tensor, element: Format) -> Tensor:
    """Rounds values to codes.

    Args:
        x: fp32, any shape, already divided by the scale. May be overwritten.
        element: The format. For e8m0, which has neither sign nor zero, x must be powers of two, Inf or NaN
            (both become 255): its rounding is a rule of its own, in ``scales``.

    Returns:
        Codes of ``element.storage``, in the shape of ``x``: float8 for the 8-bit floats, int8 for int8
            and int4 (two's
        complement), uint8 for uint4, the 4- and 6-bit floats (sign in the highest bit) and code books
        (indices).
    """
    if element.codebook:
        return nearest(x, element.name)
    if element is E8M0:
        return (x.view(torch.int32) >> 23).to(torch.uint8)
    x = x.clamp_(element.low, element.high)
    if element.exponent and not (element.is_float8 and converts(x.device)):
        return _encode_small(x, element)
    return x.to(element.storage) if element.is_float8 else x.round_().to(element.storage)


def converts(device: torch.device) -> bool:
    """Whether a device is known to convert float8 and bf16 from and to wider floats."""
    return device.type != torch._C._get_privateuse1_backend_name()


def raw(codes: Tensor) -> Tensor:
    """Views float8 as bytes, which torch copies, joins and compares everywhere; leaves the rest as it is."""
    return codes.view(torch.uint8) if codes.dtype.itemsize == 1 and codes.is_floating_point() else codes


def bits(tensor: Tensor) -> Tensor:
    """Views float8 and bf16 as integers, which a device that does not compute with them moves too."""
    return tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else raw(tensor)


def _encode_small(x: Tensor, element: Format) -> Tensor:
    """Codes of a small float. ``a + 2**(e + 23 - m)`` rounds ``a`` to steps of ``2**(e - m)``: the low bits
    are the code.

    ``e`` is the exponent of ``a``, or that of the smallest normal number for subnormals.
    """
    shift = 23 - element.mantissa
    smallest = 129 - 2 ** (element.exponent - 1)  # biased fp32 exponent of the smallest normal number
    sign = (x.view(torch.int32) >> 31).bitwise_and_(1 << element.bits - 1)
    nan = torch.isnan(x) if element.is_float8 else None
    e = (x.abs_().view(torch.int32) >> 23).clamp_min_(smallest)
    magic = (e + shift).bitwise_left_shift_(23)
    steps = x.add_(magic.view(torch.float32)).view(torch.int32).sub_(magic)
    steps.add_(e.sub_(smallest).bitwise_left_shift_(element.mantissa))
    if nan is not None:
        return steps.masked_fill_(nan, 127).bitwise_or_(sign).to(torch.uint8).view(element.storage)
    codes = steps.bitwise_or_(sign).to(torch.uint8)
    # NaN gets some code, and not one that spills over its neighbours
    return codes.bitwise_and_((1 << element.bits) - 1)


def rounded(x: Tensor, element: Format) -> Tensor:
    """``decode(encode(x))`` without the codes, and with positive zeros: fp32 values. Leaves x alone."""
    if not element.exponent or element.is_float8:
        return decode(encode(x.clone(), element), element)
    shift, smallest = 23 - element.mantissa, 129 - 2 ** (element.exponent - 1)
    x = x.clamp(element.low, element.high)
    e = x.abs().view(torch.int32).bitwise_right_shift_(23).clamp_min_(smallest).add_(shift)
    # in the middle of its octave, for both signs
    magic = e.bitwise_left_shift_(23).view(torch.float32).mul_(1.5)
    return x.add_(magic).sub_(magic)


def decode(codes: Tensor, element: Format) -> Tensor:
    """The inverse of ``encode``: fp32 values, exactly."""
    if element.codebook or (element.exponent and not (element.is_float8 and converts(codes.device))):
        return lookup(values_of(element.name, codes.device), raw(codes))
    if element is E8M0:  # 2**-127 is subnormal in fp32, 255 is NaN
        bits = codes.to(torch.int32) << 23
        bits = torch.where(codes == 0, 1 << 22, bits)
        return torch.where(codes == 255, torch.nan, bits.view(torch.float32))
    if element is BF16 and not converts(codes.device):
        return (codes.view(torch.int16).to(torch.int32) << 16).view(torch.float32)
    if codes.dtype is torch.float8_e4m3fn and computes_here(codes):
        return _decode_e4m3fn(codes)
    return codes.float()


def _decode_e4m3fn(codes: Tensor) -> Tensor:
    """Its bits, moved by seven, are those of fp16 / 256; torch's own conversion on CPUs takes ten times as
    long.
    """
    half = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    half.bitwise_or_((half + 0x80).bitwise_and_(0x4000))  # 480 is NaN
    return half.view(torch.float16).float().mul_(256)


def values_of(name: str, device: torch.device | None = None) -> Tensor:
    """Value of every code of a format with at most 8 bits, in the order of the codes: fp32 ``[2**bits]``."""
    element = FORMATS[name]
    if element.codebook:
        return codebook(name, device or torch.device("cpu"))
    if element.is_float8:  # the CPU converts it
        codes = torch.arange(256, dtype=torch.int32, device="cpu").to(torch.uint8)
        return codes.view(element.storage).float().to(device)
    codes = torch.arange(2**element.bits, dtype=torch.int32, device=device or "cpu")
    if not element.exponent:
        if element.storage is torch.int8:  # two's complement
            return torch.where(codes > element.high, codes - 2**element.bits, codes).float()
        return decode(codes.to(torch.uint8).view(element.storage), element)
    m, bias = element.mantissa, 2 ** (element.exponent - 1) - 1
    magnitude = codes & (2 ** (element.bits - 1) - 1)
    e, fraction = magnitude >> m, (magnitude & (2**m - 1)).float()
    power = (e.clamp_min(1) - bias - m).float()  # older torch takes a power of integers in the default dtype
    value = torch.ldexp(fraction + (e > 0) * 2**m, power)
    return torch.where(codes >> (element.bits - 1) > 0, -value, value)
