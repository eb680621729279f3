"""A row of the KV cache: the codes of one head at one token and, behind them, the scale that they share; all
as bytes.

Codes and scale lie in one uint8 tensor, so that whatever is done to a cache (append, crop, reorder, repeat,
select, offload) is done to both at once and no operation has to know of scales.

The scale is a bfloat16. It has the range of every dtype that a model computes in (float16 does not: one key
beyond 448 * 65504 would make it infinite), and takes 2 bytes a row: 1.6% of 128 fp8 codes, where float32
would take 3.1%. The codes are computed with the rounded scale, so that its 8 bits cost no accuracy but a step
that is at most 0.4% wider. And since every code is exact in bfloat16, a product of code and scale in bfloat16
is rounded once, as it is in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantport.errors import ConfigError, one_of
from quantport.numerics import converts, pack_bits, quantize, unpack_bits
from quantport.scheme import Quant
from quantport.scheme.formats import BF16, E4M3FN, E5M2, INT4, INT8, Format

SCALE = BF16.storage
_LEAST_ROOM = 64  # tokens


@dataclass(frozen=True)
class CacheDtype:
    """What one element of the cache becomes.

    Attributes:
        name: Canonical name.
        quant: How a row is quantized; None leaves it as the model made it, in 16 bits.
        aliases: Other spellings, those of vLLM among them.
    """

    name: str
    quant: Quant | None
    aliases: tuple[str, ...] = ()

    def row_bytes(self, width: int, itemsize: int = 2) -> int:
        """Bytes of one row.

        Args:
            width: Elements of the head.
            itemsize: Bytes of an element that is not quantized.
        """
        if self.quant is None:
            return width * itemsize
        return (width * self.quant.element.bits + 7) // 8 + SCALE.itemsize


def _row(element: str) -> Quant:
    return Quant(element, (1, 0), BF16.name)


AUTO = CacheDtype("auto", None)
_ALL = (
    AUTO,
    CacheDtype("fp8_e4m3", _row(E4M3FN.name), ("fp8", "fp8_per_token_head")),
    CacheDtype("fp8_e5m2", _row(E5M2.name)),
    CacheDtype("int8", _row(INT8.name), ("int8_per_token_head",)),
    CacheDtype("int4", _row(INT4.name), ("int4_per_token_head",)),
)
NAMES = {name: dtype for dtype in _ALL for name in (dtype.name, *dtype.aliases)}


def cache_dtype(name: str | None) -> CacheDtype:
    """Finds a dtype by its name or an alias; None is ``auto``.

    Raises:
        ConfigError: no such dtype.
    """
    found = AUTO if name is None else NAMES.get(name.lower()) if isinstance(name, str) else None
    if found is None:
        raise ConfigError(
            f"kv_cache_dtype {name!r}", "no such dtype of the KV cache", one_of(str(name), NAMES)
        )
    return found


def encode(x: Tensor, dtype: CacheDtype) -> Tensor:
    """Quantizes every row by itself: the result does not depend on what else is in the tensor.

    ``scale = amax / 448`` (57344, 127.5, 7.5), rounded to bfloat16; a zero row gets 2**-23; ``code =
    clamp(round_half_even(x / scale))``. A row that holds a NaN or an Inf reads back as NaN throughout: it can
    be seen, it is not clipped, and other rows are untouched. int4 codes lie two to a byte, low nibble first,
    as code + 8.

    Args:
        x: ``[..., width]``, floating. Gradients stop here.
        dtype: Target.

    Returns:
        uint8 ``[..., row bytes]``.
    """
    x = x.detach()
    if dtype.quant is None:
        return x.contiguous().view(torch.uint8)
    if not x.numel():
        return torch.empty(*x.shape[:-1], dtype.row_bytes(x.shape[-1]), dtype=torch.uint8, device=x.device)
    codes, scale = quantize(x.reshape(-1, x.shape[-1]), dtype.quant)
    scale = torch.where(torch.isfinite(scale), scale, torch.nan)
    if dtype.quant.element is INT4:
        codes = pack_bits(codes.add(8).view(torch.uint8), 4)
    rows = torch.cat((codes.view(torch.uint8), scale.view(torch.uint8)), dim=1)
    return rows.view(*x.shape[:-1], rows.shape[1])


def decode(rows: Tensor, width: int, dtype: CacheDtype, out: torch.dtype) -> Tensor:
    """Reads rows back: ``code * scale``, rounded once.

    Args:
        rows: uint8 ``[..., row bytes]``, from ``encode``.
        width: Elements of the head.
        dtype: What they were encoded to.
        out: Dtype to return; for ``auto`` that of the encoded tensor.

    Returns:
        ``[..., width]`` of dtype ``out``.
    """
    if dtype.quant is None:
        return rows.view(out)
    element = dtype.quant.element
    codes, scale = rows[..., : -SCALE.itemsize], rows[..., -SCALE.itemsize :]
    # a copy is aligned; in a row it need not be
    scale = scale.clone(memory_format=torch.contiguous_format).view(SCALE)
    work = torch.bfloat16 if out is torch.bfloat16 else torch.float32
    if element is INT4:
        codes = unpack_bits(codes, width, 4).sub_(8)
    wide = _widen(codes, element, work)
    wide.mul_(scale.to(work))
    if out is torch.float16:  # code -128 may lie half a step beyond the largest half
        wide.clamp_(torch.finfo(out).min, torch.finfo(out).max)
    return wide.to(out)


def with_room(rows: Tensor, own: tuple[int, int], length: int) -> Tensor:
    """Memory ``[batch, heads, capacity, row bytes]`` that begins with rows, for ``length`` tokens at least.

    It is the memory in which they lie, if that is the caller's own and has room, else a copy with room for an
    eighth more.

    Args:
        rows: ``[batch, heads, tokens, row bytes]``.
        own: Address and capacity of what was returned before.
        length: Tokens.
    """
    batch, heads, tokens, row = rows.shape
    address, capacity = own
    strides = (heads * capacity * row, capacity * row, row, 1)
    if rows.data_ptr() == address and rows.stride() == strides and length <= capacity:
        return rows.as_strided((batch, heads, capacity, row), strides)
    capacity = length + max(_LEAST_ROOM, length // 8) if tokens else length
    with torch.inference_mode(False):  # what is made inside could not be written outside of it
        longer = torch.empty(batch, heads, capacity, row, dtype=rows.dtype, device=rows.device)
        longer[:, :, :tokens] = rows
    return longer


def _widen(codes: Tensor, element: Format, work: torch.dtype) -> Tensor:
    """Bytes of codes as a new tensor of values.

    The host converts fp8 one by one, and some devices cannot. Its bits moved to those of fp16 are exact and
    several times as fast: e5m2 is the upper byte, e4m3fn (NaN apart, which the scale of its row is too) the
    value over 256.
    """
    if not element.is_float8 or (converts(codes.device) and not codes.is_cpu):
        return codes.view(element.storage).to(work)
    bits = codes.view(torch.int8).to(torch.int16)
    if element is E5M2:
        return bits.mul_(256).view(torch.float16).to(work)
    return bits.mul_(128).bitwise_and_(~0x4000).view(torch.float16).to(work).mul_(256)
