"""Quantizes weights row by row: chooses the kernel of a scheme, and calls it with tensors."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from quantport.backend import Quant, Scheme, empty_weight, numerics, once
from quantport_cpu.jit import block_encode, gguf, kquants, least_squares, q6k, search
from quantport_cpu.jit.memory import Array, array, array_of_rows, constants

_KINDS = {"e8m0": block_encode.E8M0, "e4m3fn": block_encode.E4M3, "fp32": block_encode.F32_SCALE}
_INT4_MSE = Quant("int4", (1, least_squares.GROUP), "bf16", "mse", zero_point=True)
_DUAL = Quant("e2m1", (1, search.INNER), "e8m0", "mse", outer_block=(1, search.OUTER))
_BLOCKS = ("e4m3fn", "e2m1", "e2m3", "e3m2", "nf4", "fp4")


def quantize(weight: Tensor, scheme: Scheme) -> dict[str, Tensor] | None:
    """Quantizes a bf16 weight ``[n, k]`` with contiguous rows, on the calling thread.

    Returns:
        The tensors of ``scheme.layout(n, k)``, or None where no kernel is for the scheme.
    """
    quant = scheme.weight
    if quant.element.block:
        return _gguf(weight, scheme)
    if quant == _INT4_MSE:
        return _int4(weight, scheme)
    if (
        quant.format not in _BLOCKS
        or quant.block_shape[0] != 1
        or quant.group_size % 16
        or not quant.group_size
        or quant.zero_point
    ):
        return None
    if replace(quant, rule=_DUAL.rule) == _DUAL:
        return _dual(weight, scheme)
    if (
        quant.scale not in _KINDS
        or quant.outer_block not in (None, (0, 0))
        or (quant.searched and quant.group_size > 32)
    ):
        return None
    stored = empty_stored(weight, scheme)
    if quant.scale_quant:  # the codes of the second pass are those that count
        scale = torch.empty(stored["weight_scale"].shape, dtype=torch.float32, device=weight.device)
        _blocks(weight, quant, {**stored, "weight_scale": scale})
        stored |= numerics.quantize_scales(scale)
        rounded = {**stored, "weight_scale": numerics.dequantize_scales(stored)}
        _blocks(weight, quant, rounded, is_scale_stored=True)
    else:
        _blocks(weight, quant, stored)
    return stored


@once
def trials(top: int) -> Array:
    """Start and length of each grid that ``least_squares_grid`` tries, as fractions of the reach."""
    ends = [1 - i * 0.8 / top for i in range(3)]
    return constants([value for down, up in product(ends, ends) for value in (down, down + up)])


def _int4(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    stored = empty_stored(weight, scheme)
    codes, scale, zero = _arrays(stored, weight, scheme)
    least_squares.kernel(
        *_source(weight),
        codes,
        4 * stored["weight_packed"].stride(0),
        scale,
        zero,
        trials(15),
        scratch_bytes(weight, 768),
    )
    return stored


def _dual(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    stored = empty_stored(weight, scheme)
    codes, scale, outer = _arrays(stored, weight, scheme)
    add, emax, high = e8m0_rule(scheme.weight)
    search.dual_kernel(
        *_source(weight),
        codes,
        stored["weight_packed"].stride(0),
        scale,
        outer,
        scratch_bytes(weight, 7 * search.OUTER),
        int(scheme.weight.searched),
        add,
        emax,
        fp32_bits(high),
    )
    return stored


def _gguf(weight: Tensor, scheme: Scheme) -> dict[str, Tensor] | None:
    name, stored, work = scheme.weight.format, empty_stored(weight, scheme), scratch_bytes(weight, 1024)
    (blocks_,) = _arrays(stored, weight, scheme)
    if name in gguf.BYTES:
        gguf.kernel(name)(*_source(weight), blocks_, work)
    elif name in kquants.BYTES:
        kquants.kernel(name)(*_source(weight), blocks_, trials(15 if name == "q4_k" else 31), work)
    elif name == "q6_k":
        q6k.kernel(*_source(weight), blocks_, work)
    else:
        return None
    return stored


def empty_stored(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """Uninitialized tensors of ``scheme.layout``."""
    n, k = weight.shape
    return {
        name: empty_weight(shape, dtype, weight.device)
        for name, (shape, dtype) in scheme.layout(n, k).items()
    }


def scratch_bytes(near: Tensor, size: int) -> Array:
    """Uninitialized bytes on the device of a tensor."""
    return array(torch.empty(size, dtype=torch.uint8, device=near.device), torch.uint8, size)


def _arrays(stored: dict[str, Tensor], weight: Tensor, scheme: Scheme) -> list[Array]:
    layout = scheme.layout(*weight.shape)
    return [array(stored[name], dtype, *shape) for name, (shape, dtype) in layout.items()]


def _source(weight: Tensor) -> tuple[int, Array, int, int]:
    """The first arguments of every kernel here: rows, the weight, the bytes from row to row, and columns."""
    n, k = weight.shape
    return n, array_of_rows(weight, torch.bfloat16, n, k), 2 * weight.stride(0), k


def fp32_bits(value: float) -> int:
    """The bits of an fp32 as an integer."""
    return int.from_bytes(struct.pack("<f", value), "little")


def e8m0_rule(quant: Quant) -> tuple[int, int, float]:
    """The rule of power-of-two scales, as numbers for ``minifloat_encode.e8m0_code``.

    Returns:
        What is added to the bits of amax, the exponent of the largest element, the divisor of amax or 0.
    """
    element = quant.element
    emax = math.frexp(element.high)[1] - 1
    mantissa = element.mantissa
    if quant.rule == "rceil":
        return (1 << 23) - 1, emax, element.high
    added = {"ceil": (1 << 23) - 1, "even": 1 << (22 - mantissa), "even1": 1 << 21}
    return added.get(quant.rule, 0), emax, 0.0


def _blocks(weight: Tensor, quant: Quant, stored: dict[str, Tensor], is_scale_stored: bool = False) -> None:
    n, k = weight.shape
    codes, scale = stored.get("weight", stored.get("weight_packed")), stored["weight_scale"]
    assert codes is not None  # every layout without GGUF blocks has one of them
    width = k if quant.element.bits == 8 else codes.shape[1]
    add, emax, high = int(is_scale_stored), 0, quant.element.half_range
    if quant.scale == "e8m0":
        add, emax, high = e8m0_rule(quant)
    factor = 1.0
    if quant.outer_block:
        factor = _global_factor(weight, quant)
        stored["weight_global_scale"][0] = factor
    block_encode.kernel(quant.format, quant.group_size, _KINDS[quant.scale], quant.searched)(
        *_source(weight),
        array(codes, quant.element.storage, n, width),
        width * codes.element_size(),
        array(scale, quant.scale_dtype, *quant.scale_shape(n, k)),
        scratch_bytes(weight, 3 * quant.group_size),
        add,
        emax,
        fp32_bits(high),
        fp32_bits(factor),
        int(quant.element.bits == 4 and k % 2 == 1),
    )


def _global_factor(weight: Tensor, quant: Quant) -> float:
    """The factor of NVFP4's block scales, from the largest magnitude of the weight."""
    n = weight.shape[0]
    maxima = torch.empty(n, dtype=torch.float32, device=weight.device)
    block_encode.row_maxima_kernel(*_source(weight), array(maxima, torch.float32, n))
    return float(numerics.global_factor(maxima.amax(), quant.element))
