"""Few rows of activations times a quantized weight, summed in fp32 or in exact integers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quantport.backend import BackendError, once
from quantport_cpu.jit import digits, dots, floats, nibbles
from quantport_cpu.jit.elements import ELEMENTS
from quantport_cpu.jit.frame import threads_for
from quantport_cpu.jit.memory import Array, array, constants

MOST = 8  # rows of x
ONE = constants((1.0,))
_SPAN = 32  # weight rows that a thread takes at a time; it divides the 128 rows of a block of scales


def padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """x as contiguous fp32 with zeros up to ``rows`` and ``columns``."""
    if x.shape == (rows, columns):
        return x.float().contiguous()
    out = fp32(x, rows, columns).zero_()
    out[: x.shape[0], : x.shape[1]] = x
    return out


def few(x: Tensor) -> torch.Size:
    """The shape of activations that are few enough.

    Raises:
        BackendError: they are none, or more than ``MOST`` rows.
    """
    if x.dim() != 2 or not 0 < x.shape[0] <= MOST:
        raise BackendError(
            "multiply few rows by a compiled kernel",
            f"activations {list(x.shape)}",
            f"[M, K] with M from 1 to {MOST}",
        )
    return x.shape


def fp32(x: Tensor, *shape: int) -> Tensor:
    """An uninitialized fp32 tensor where x is."""
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def fp8(x: Tensor, codes: Tensor, scale: Tensor | None = None) -> Tensor:
    """e4m3fn weights, decoded exactly.

    Args:
        x: ``[M, K]``, M from 1 to 8, any floating dtype.
        codes: uint8 ``[N, K]``, contiguous.
        scale: fp32 ``[ceil(N/128), ceil(K/128)]``, contiguous, or None for scales that the caller multiplies.

    Returns:
        fp32 ``[M, N]``.
    """
    (m, k), n = few(x), codes.shape[0]
    rows = 1 << (m - 1).bit_length()
    values = padded(x, rows, -(-k // dots.STEP) * dots.STEP)
    out = fp32(x, rows, n)
    scales, step, stride, chunk = blocks_of_128(scale, n, k)
    dots.fp8_kernel(
        -(-n // _SPAN),
        array(values, torch.float32, *values.shape),
        4 * values.shape[1],
        array(codes, torch.uint8, n, k),
        n,
        k,
        scales,
        step,
        stride,
        chunk,
        array(out, torch.float32, rows, n),
        4 * n,
        rows,
        _SPAN,
        threads=threads_for(n * k),
    )
    return out if rows == m else out[:m]


def blocks_of_128(scale: Tensor | None, n: int, k: int) -> tuple[Array, int, int, int]:
    """Scales of 128x128 blocks, the bytes from one to the next and from row to row, and the columns of a
    block; or ones.
    """
    if scale is None:
        return ONE, 0, 0, k
    columns = -(-k // 128)
    return array(scale, torch.float32, -(-n // 128), columns), 4, 4 * columns, 128


def int8(x: Tensor, codes: Tensor) -> Tensor:
    """int8 weights with 16-bit activations.

    Args:
        x: ``[M, K]``, M from 1 to 8, any floating dtype.
        codes: int8 ``[N, K]``, contiguous.

    Returns:
        fp32 ``[M, N]``, without the scales of the channels.
    """
    (m, k), n = few(x), codes.shape[0]
    rows, columns = m + (m > 1 and m % 2), -(-k // 64) * 64
    planes, scale, _ = digits_of(x, rows, columns, 0)
    out = fp32(x, rows, n)
    dots.int8_kernel(
        -(-n // _SPAN),
        planes,
        3 * columns,
        scale,
        array(codes, torch.int8, n, k),
        n,
        k,
        array(out, torch.float32, rows, n),
        4 * n,
        rows,
        _SPAN,
        threads=threads_for(n * k),
    )
    return out if rows == m else out[:m]


def int4(x: Tensor, packed: Tensor, pairs: Tensor, group: int) -> Tensor:
    """int4 weights in ATen's layout for blocks of 64 channels.

    Args:
        x: ``[M, K]``, M from 1 to 8, any floating dtype.
        packed: uint8 ``[N, K'/2]``, contiguous; N a multiple of 64, K' of ``group`` and of 64, not below K.
        pairs: bf16 ``[K'/group, N, 2]``, contiguous: the scale, and the offset that is added.
        group: Columns that share a scale: 32 to 256, a multiple of 8.

    Returns:
        fp32 ``[M, N]``.
    """
    m, n, k = few(x)[0], packed.shape[0], 2 * packed.shape[1]
    rows = m + (m > 1 and m % 2)
    planes, scale, sums = digits_of(x, rows, k, group)
    out = fp32(x, rows, n)
    nibbles.int4_kernel(
        n // nibbles.BLOCK,
        planes,
        sums,
        scale,
        array(packed, torch.uint8, n, k // 2),
        n,
        k,
        group,
        array(pairs, torch.bfloat16, k // group, n, 2),
        4 * n,
        array(out, torch.float32, rows, n),
        rows,
        threads=threads_for(n * k),
    )
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

    def rows(self, first: int, count: int) -> Blocks:
        """``count`` rows from ``first`` on."""
        part = slice(first, first + count)
        outer = None if self.outer is None else self.outer[part]
        return self._replace(codes=self.codes[part], scale=self.scale[part], outer=outer)


def unit(weight: Blocks) -> float:
    """What the results of ``blocks`` and ``decode`` are to be multiplied with."""
    return floats.UNIT.get(weight.name, 1.0) * (floats.SCALE_UNIT if weight.scale_name == "e4m3fn" else 1.0)


def blocks(x: Tensor, weight: Blocks) -> Tensor:
    """x times the weight over ``unit``.

    Args:
        x: ``[M, K]``, M from 1, any floating dtype.
        weight: The weight ``[N, K]``.

    Returns:
        fp32 ``[M, N]``.
    """
    m, n = x.shape[0], weight.codes.shape[0]
    rows, turn = m if m <= 2 else -(-m // 4) * 4, floats.ORDER[ELEMENTS[weight.name].bits]
    values = padded(x, rows, weight.k)
    if turn > 1:
        values = values.view(rows, -1, floats.STEP // turn, turn).transpose(2, 3).contiguous()
    out = fp32(x, rows, n)
    _blocks(weight, array(values.view(rows, weight.k), torch.float32, rows, weight.k), out, _SPAN)
    return out if rows == m else out[:m]


def decode(weight: Blocks, out: Tensor) -> Tensor:
    """Writes the weight over ``unit`` to ``out`` fp32 ``[N, K]``."""
    _blocks(weight, None, out, 4)
    return out


def _blocks(weight: Blocks, x: Array | None, out: Tensor, span: int) -> None:
    """The products with rows of x, as many as ``out`` has, or the values of the weight."""
    name, k, n, outer = weight.name, weight.k, weight.codes.shape[0], weight.outer
    rows = out.shape[0] if x else n
    group, dtype = -(-k // weight.group), _SCALES.get(weight.scale_name, (floats.F32_SCALE, torch.float32))[1]
    kind = floats.DUAL if outer is not None else _SCALES.get(weight.scale_name, (floats.F32_SCALE, dtype))[0]
    outers = -(-k // floats.OUTER)
    floats.kernel(name, kind, weight.group)(
        -(-n // span),
        x or 0,
        4 * k,
        array(weight.codes, torch.uint8, n, k * ELEMENTS[name].bits // 8),
        n,
        k,
        array(weight.scale, dtype, n, group),
        group * dtype.itemsize,
        0 if outer is None else array(outer, torch.float32, n, outers),
        4 * outers,
        _table(name),
        array(out, torch.float32, rows, n if x else k),
        rows if x else 0,
        span,
        4 * n,
        threads=threads_for(n * k),
    )


_SCALES = {"e8m0": (floats.E8M0, torch.uint8), "e4m3fn": (floats.E4M3, torch.uint8)}


@once
def _table(name: str) -> Array:
    """The values of a 4-bit format; zeros for others."""
    return constants(ELEMENTS[name].values or (0.0,) * 16)


def digits_of(x: Tensor, rows: int, columns: int, group: int) -> tuple[Array, Array, Array]:
    """Digits of x, uint8 ``[rows, 3, columns]``; their scale for each row, fp32; and the sums of each group,
    int32.
    """
    values = array(padded(x, rows, columns), torch.float32, rows, columns)
    groups = columns // group if group else 0
    planes = array(
        torch.empty(rows, 3, columns, dtype=torch.uint8, device=x.device), torch.uint8, rows, 3, columns
    )
    scale = array(fp32(x, rows), torch.float32, rows)
    sums = array(
        torch.empty(rows, groups, 3, 4, dtype=torch.int32, device=x.device), torch.int32, rows, groups, 3, 4
    )
    digits.kernel(rows, values, columns, planes, scale, group, sums, threads=threads_for(rows * columns))
    return planes, scale, sums
