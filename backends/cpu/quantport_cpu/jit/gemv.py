"""Few rows of activations times a quantized weight, summed in fp32 or in exact integers."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numba.core.codegen
import numba.core.config
import torch
from torch import Tensor

from quantport.backend import FORMATS, numerics
from quantport_cpu.jit import digits, dots, floats, nibbles
from quantport_cpu.jit.frame import threads_for

MOST = 8  # rows of x
_ONE = torch.ones(1)
_SPAN = 32  # weight rows that a thread takes at a time; it divides the 128 rows of a block of scales


@cache
def vnni_reason() -> str:
    """Why the integer kernels (int4, int8) cannot run on this processor: '' where they can."""
    codegen: Any = numba.core.codegen
    chosen = getattr(numba.core.config, "CPU_FEATURES", None)  # NUMBA_CPU_FEATURES
    features = str(codegen.get_host_cpu_features() if chosen is None else chosen)
    missing = [f for f in ("avx512f", "avx512bw", "avx512vnni") if f"+{f}" not in features.split(",")]
    return f"the processor has no {', '.join(missing)}" if missing else ""


def padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """x as contiguous fp32 with zeros up to ``rows`` and ``columns``."""
    if x.shape == (rows, columns):
        return x.float().contiguous()
    out = torch.zeros(rows, columns)
    out[: x.shape[0], : x.shape[1]] = x
    return out


def fp8(x: Tensor, codes: Tensor, scale: Tensor | None = None) -> Tensor:
    """e4m3fn weights, decoded exactly.

    Args:
        x: ``[M, K]``, M from 1 to 8, any floating dtype.
        codes: uint8 or float8_e4m3fn ``[N, K]``, contiguous.
        scale: fp32 ``[ceil(N/128), ceil(K/128)]``, contiguous, or None for scales that the caller multiplies.

    Returns:
        fp32 ``[M, N]``.
    """
    (m, k), n = x.shape, codes.shape[0]
    rows = 1 << (m - 1).bit_length()
    values = padded(x, rows, -(-k // dots.STEP) * dots.STEP)
    out = torch.empty(rows, n)
    step, stride, chunk = (0, 0, k) if scale is None else (4, 4 * scale.stride(0), 128)
    scales = _ONE if scale is None else scale
    dots.fp8_kernel(
        -(-n // _SPAN), values.data_ptr(), 4 * values.stride(0), codes.data_ptr(), n, k, scales.data_ptr(), step, stride, chunk,
        out.data_ptr(), 4 * n, rows, _SPAN, threads=threads_for(n * k),
    )  # fmt: skip
    return out if rows == m else out[:m]


def int8(x: Tensor, codes: Tensor) -> Tensor:
    """int8 weights with 16-bit activations. Needs ``vnni_reason() == ''``.

    Args:
        x: ``[M, K]``, M from 1 to 8, any floating dtype.
        codes: int8 ``[N, K]``, contiguous.

    Returns:
        fp32 ``[M, N]``, without the scales of the channels.
    """
    (m, k), n = x.shape, codes.shape[0]
    rows, columns = m + (m > 1 and m % 2), -(-k // 64) * 64
    _memory, planes, scale, _ = digits_of(x, rows, columns, 0)
    out = torch.empty(rows, n)
    dots.int8_kernel(
        -(-n // _SPAN), planes, 3 * columns, scale, codes.data_ptr(), n, k, out.data_ptr(), 4 * n, rows,
        _SPAN, threads=threads_for(n * k),
    )  # fmt: skip
    return out if rows == m else out[:m]


def int4(x: Tensor, packed: Tensor, pairs: Tensor, group: int) -> Tensor:
    """int4 weights in ATen's layout for blocks of 64 channels. Needs ``vnni_reason() == ''``.

    Args:
        x: ``[M, K]``, M from 1 to 8, any floating dtype.
        packed: uint8 ``[N, K'/2]``, contiguous; N a multiple of 64, K' of ``group`` and of 64, not below K.
        pairs: bf16 ``[K'/group, N, 2]``, contiguous: the scale, and the offset that is added.
        group: Columns that share a scale: 32 to 256, a multiple of 8.

    Returns:
        fp32 ``[M, N]``.
    """
    m, n, k = x.shape[0], packed.shape[0], 2 * packed.shape[1]
    rows = m + (m > 1 and m % 2)
    _memory, planes, scale, sums = digits_of(x, rows, k, group)
    out = torch.empty(rows, n)
    nibbles.int4_kernel(
        n // nibbles.BLOCK, planes, sums, scale, packed.data_ptr(), n, k, group,
        pairs.data_ptr(), 4 * n, out.data_ptr(), rows, threads=threads_for(n * k),
    )  # fmt: skip
    return out if rows == m else out[:m]


class Blocks(NamedTuple):
    """A weight in a small float or a code book.

    Attributes:
        name: Element format.
        scale_name: Format of the scales.
        group: Columns that share one.
        codes: uint8 ``[N, bytes]``, contiguous.
        scale: ``[N, K / group]``, contiguous.
        outer: fp32 ``[N, ceil(K / 512)]``, contiguous, or None.
        k: Columns, a multiple of 32.
    """

    name: str
    scale_name: str
    group: int
    codes: Tensor
    scale: Tensor
    outer: Tensor | None
    k: int


def unit(weight: Blocks) -> float:
    """What the results of ``blocks`` and ``decode`` are to be multiplied with."""
    return floats.UNIT.get(weight.name, 1.0) * (floats.SCALE_UNIT if weight.scale_name == "e4m3fn" else 1.0)


def blocks(x: Tensor, weight: Blocks) -> Tensor:
    """x times the weight over ``unit``. Needs ``vnni_reason() == ''``.

    Args:
        x: ``[M, K]``, M from 1, any floating dtype.
        weight: The weight ``[N, K]``.

    Returns:
        fp32 ``[M, N]``.
    """
    m, n = x.shape[0], weight.codes.shape[0]
    rows, turn = m if m <= 2 else -(-m // 4) * 4, floats.ORDER[FORMATS[weight.name].bits]
    values = padded(x, rows, weight.k)
    if turn > 1:
        values = values.view(rows, -1, floats.STEP // turn, turn).transpose(2, 3).contiguous()
    out = torch.empty(rows, n)
    _blocks(weight, values.data_ptr(), 0, n, out.data_ptr(), rows, _SPAN)
    return out if rows == m else out[:m]


def decode(weight: Blocks, first: int, out: Tensor) -> Tensor:
    """Writes rows from ``first`` on, over ``unit``, to ``out`` fp32 ``[rows, K]``."""
    _blocks(weight, 0, first, out.shape[0], out.data_ptr(), 0, 4)
    return out


def _blocks(weight: Blocks, x: int, first: int, n: int, out: int, m: int, span: int) -> None:
    codes, scale, outer, k = weight.codes, weight.scale, weight.outer, weight.k
    kind = (
        floats.DUAL if outer is not None else {"e8m0": floats.E8M0, "e4m3fn": floats.E4M3}.get(weight.scale_name, floats.F32_SCALE)
    )
    stride, outers = scale.stride(0) * scale.element_size(), 0 if outer is None else 4 * outer.stride(0)
    floats.kernel(weight.name, kind, weight.group)(
        -(-n // span), x, 4 * k, codes.data_ptr() + first * codes.stride(0), n, k, scale.data_ptr() + first * stride, stride,
        0 if outer is None else outer.data_ptr() + first * outers, outers, _table(weight.name).data_ptr(), out, m, span, 4 * n,
        threads=threads_for(n * k),
    )  # fmt: skip


@cache
def _table(name: str) -> Tensor:
    """The values of a 4-bit format; zeros for others."""
    return numerics.values_of(name).float().contiguous() if FORMATS[name].bits == 4 else torch.zeros(16)


def digits_of(x: Tensor, rows: int, columns: int, group: int) -> tuple[Tensor, int, int, int]:
    """Digits of x, their scale for each row, and the sums of each group: the memory, and the three addresses in it."""
    values = padded(x, rows, columns)
    groups = columns // group if group else 0
    memory = torch.empty(rows * (3 * columns + 4 + 48 * groups), dtype=torch.uint8)
    planes = memory.data_ptr()
    scale = planes + rows * 3 * columns
    sums = scale + 4 * rows
    digits.kernel(rows, values.data_ptr(), columns, planes, scale, group, sums, threads=threads_for(rows * columns))
    return memory, planes, scale, sums
