"""Multiplies a small batch, at most a few rows of activations, by a quantized weight.

Sums are in fp32, or in exact integers. The modules ``gemv_*`` generate the code, which is called here with
tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quantport.backend import once
from quantport_cpu.jit import decode as decoding
from quantport_cpu.jit import gemv_blocks
from quantport_cpu.jit.elements import ELEMENTS
from quantport_cpu.jit.memory import Array, array, constants
from quantport_cpu.jit.parallel_for import threads_for

ONE = constants((1.0,))
SPAN = 32  # weight rows that a thread takes at a time; it divides the 128 rows of a block of scales


def padded_fp32(x: Tensor, rows: int, columns: int) -> Tensor:
    """x as contiguous fp32 with zeros up to ``rows`` and ``columns``."""
    if x.shape == (rows, columns):
        return x.float().contiguous()
    out = empty_fp32(x, rows, columns).zero_()
    out[: x.shape[0], : x.shape[1]] = x
    return out


def empty_fp32(x: Tensor, *shape: int) -> Tensor:
    """An uninitialized fp32 tensor on the device of x."""
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def scales_of_128_blocks(scale: Tensor | None, *shape: int) -> tuple[Array, int, int, int]:
    """Scales of 128x128 blocks of weights ``[..., N, K]`` for a kernel; a single one where there are none.

    Returns:
        The scales, the bytes from one to the next, the bytes from row to row, and the columns of a block.
    """
    *several, n, k = shape
    if scale is None:
        return ONE, 0, 0, k
    columns = -(-k // 128)
    return array(scale, torch.float32, *several, -(-n // 128), columns), 4, 4 * columns, 128


def decode_fp8(codes: Tensor, scale: Tensor | None, first: int, out: Tensor) -> Tensor:
    """Writes rows of e4m3fn weights over 256 to ``out``, bf16 ``[rows, K]``.

    Args:
        codes: int8 or uint8 ``[N, K]``, contiguous: the whole weight.
        scale: fp32 ``[ceil(N/128), ceil(K/128)]``, contiguous, or None for scales that the caller multiplies.
        first: The first row.
        out: The panel.
    """
    (n, k), count = codes.shape, len(out)
    scales, step, stride, chunk = scales_of_128_blocks(scale, n, k)
    decoding.fp8_kernel(
        count,
        array(codes[first : first + count], codes.dtype, count, k),
        k,
        chunk,
        scales,
        step,
        stride,
        first,
        array(out, torch.bfloat16, count, k),
        threads=threads_for(out.numel()),
    )
    return out


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

    def rows(self, first: int, count: int) -> Blocks:
        """``count`` rows from ``first`` on."""
        part = slice(first, first + count)
        outer = None if self.outer is None else self.outer[part]
        return self._replace(codes=self.codes[part], scale=self.scale[part], outer=outer)


def unit(weight: Blocks) -> float:
    """The factor that the results of ``blocks`` and ``decode`` lack."""
    scale_unit = gemv_blocks.SCALE_UNIT if weight.scale_name == "e4m3fn" else 1.0
    return gemv_blocks.UNIT.get(weight.name, 1.0) * scale_unit


def blocks(x: Tensor, weight: Blocks) -> Tensor:
    """x times the weight over ``unit``.

    Args:
        x: ``[M, K]``, M from 1, any floating dtype.
        weight: The weight ``[N, K]``.

    Returns:
        fp32 ``[M, N]``.
    """
    m, n = x.shape[0], weight.codes.shape[0]
    rows, turn = m if m <= 2 else -(-m // 4) * 4, gemv_blocks.INTERLEAVE[ELEMENTS[weight.name].bits]
    values = padded_fp32(x, rows, weight.k)
    if turn > 1:
        values = values.view(rows, -1, gemv_blocks.STEP // turn, turn).transpose(2, 3).contiguous()
    out = empty_fp32(x, rows, n)
    _run_blocks(weight, array(values.view(rows, weight.k), torch.float32, rows, weight.k), out, SPAN)
    return out if rows == m else out[:m]


def decode(weight: Blocks, out: Tensor) -> Tensor:
    """Writes the weight over ``unit`` to ``out`` ``[N, K]``, fp32 or bf16."""
    _run_blocks(weight, None, out, 4)
    return out


def _run_blocks(weight: Blocks, x: Array | None, out: Tensor, span: int) -> None:
    """Writes to ``out`` the products of its rows of x, or, without x, the weight over ``unit``."""
    name, k, n, outer = weight.name, weight.k, weight.codes.shape[0], weight.outer
    rows, groups, outers = out.shape[0] if x else n, -(-k // weight.group), -(-k // gemv_blocks.OUTER)
    kind, dtype = _SCALES[weight.scale_name]
    if outer is not None:
        kind = gemv_blocks.DUAL
    gemv_blocks.kernel(name, kind, weight.group)(
        -(-n // span),
        x or 0,
        4 * k,
        array(weight.codes, torch.uint8, n, k * ELEMENTS[name].bits // 8),
        n,
        k,
        array(weight.scale, dtype, n, groups),
        groups * dtype.itemsize,
        0 if outer is None else array(outer, torch.float32, n, outers),
        4 * outers,
        _value_table(name),
        array(out, out.dtype, rows, n if x else k),
        rows if x else DECODED[out.dtype],
        span,
        4 * n,
        threads=threads_for(n * k),
    )


DECODED = {torch.float32: gemv_blocks.FP32, torch.bfloat16: gemv_blocks.BF16}
# How scales of a format are stored.
_SCALES = {
    "e8m0": (gemv_blocks.E8M0, torch.uint8),
    "e4m3fn": (gemv_blocks.E4M3, torch.uint8),
    "fp32": (gemv_blocks.F32_SCALE, torch.float32),
}


@once
def _value_table(name: str) -> Array:
    """The values of a 4-bit format; zeros for others."""
    return constants(ELEMENTS[name].values or (0.0,) * 16)
