"""Calls the quantizers that go over a weight row by row: which kernel serves a scheme, and what it is
given.
"""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from quantport.backend import Quant, Scheme, numerics, once
from quantport_cpu.jit import blocks, gguf, grid, kquants, memory, q6k, search
from quantport_cpu.jit.memory import Array, array, constants

_KINDS = {"e8m0": blocks.E8M0, "e4m3fn": blocks.E4M3, "fp32": blocks.F32_SCALE}
_INT4_MSE = Quant("int4", (1, grid.GROUP), "bf16", "mse", zero_point=True)
_DUAL = Quant("e2m1", (1, search.INNER), "e8m0", "mse", outer_block=(1, search.OUTER))
_BLOCKS = ("e4m3fn", "e2m1", "e2m3", "e3m2", "nf4", "fp4")


def quantize(weight: Tensor, scheme: Scheme) -> dict[str, Tensor] | None:
    """Quantizes a bf16 weight ``[n, k]`` with contiguous rows on the calling thread; None where no kernel
    serves it.
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
    stored = empty(weight, scheme)
    if quant.scale_quant:  # the codes of the second pass are those that count
        scale = torch.empty(stored["weight_scale"].shape, dtype=torch.float32, device=weight.device)
        _blocks(weight, quant, {**stored, "weight_scale": scale})
        stored |= numerics.quantize_scales(scale)
        _blocks(weight, quant, {**stored, "weight_scale": numerics.dequantize_scales(stored)}, given=True)
    else:
        _blocks(weight, quant, stored)
    return stored


@once
def trials(top: int) -> Array:
    """What ``search.least_squares_grid`` tries, as fractions of the reach: where a grid starts, and how long
    it is.
    """
    ends = [1 - i * 0.8 / top for i in range(3)]
    return constants([value for down, up in product(ends, ends) for value in (down, down + up)])


def _int4(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    stored = empty(weight, scheme)
    codes, scale, zero = _arrays(stored, weight, scheme)
    grid.kernel(
        *_source(weight),
        codes,
        4 * stored["weight_packed"].stride(0),
        scale,
        zero,
        trials(15),
        scratch(weight, 768),
    )
    return stored


def _dual(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    stored = empty(weight, scheme)
    codes, scale, outer = _arrays(stored, weight, scheme)
    add, emax, high = rule(scheme.weight)
    search.dual_kernel(
        *_source(weight),
        codes,
        stored["weight_packed"].stride(0),
        scale,
        outer,
        scratch(weight, 7 * search.OUTER),
        int(scheme.weight.searched),
        add,
        emax,
        bits(high),
    )
    return stored


def _gguf(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    name, stored, work = scheme.weight.format, empty(weight, scheme), scratch(weight, 1024)
    (blocks_,) = _arrays(stored, weight, scheme)
    if name in gguf.BYTES:
        gguf.kernel(name)(*_source(weight), blocks_, work)
    elif name in kquants.BYTES:
        kquants.kernel(name)(*_source(weight), blocks_, trials(15 if name == "q4_k" else 31), work)
    else:
        q6k.kernel(*_source(weight), blocks_, work)
    return stored


def empty(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """Uninitialized tensors of the layout."""
    n, k = weight.shape
    return {
        name: torch.empty(shape, dtype=dtype, device=weight.device)
        for name, (shape, dtype) in scheme.layout(n, k).items()
    }


def scratch(near: Tensor, size: int) -> Array:
    """Uninitialized bytes where a tensor is."""
    return array(torch.empty(size, dtype=torch.uint8, device=near.device), torch.uint8, size)


def _arrays(stored: dict[str, Tensor], weight: Tensor, scheme: Scheme) -> list[Array]:
    layout = scheme.layout(*weight.shape)
    return [array(stored[name], dtype, *shape) for name, (shape, dtype) in layout.items()]


def _source(weight: Tensor) -> tuple[int, Array, int, int]:
    """Blocks of one row each, the weight, the bytes from row to row, and columns: with these all frames here
    begin.
    """
    n, k = weight.shape
    return n, memory.rows(weight, torch.bfloat16, n, k), 2 * weight.stride(0), k


def bits(value: float) -> int:
    """An fp32 as an integer."""
    return int.from_bytes(struct.pack("<f", value), "little")


def rule(quant: Quant) -> tuple[int, int, float]:
    """What a rule of power-of-two scales adds to the bits of amax, the exponent of the largest element, and
    what amax is divided by, or 0.
    """
    element = quant.element
    emax = math.frexp(element.high)[1] - 1
    mantissa = element.mantissa
    if quant.rule == "rceil":
        return (1 << 23) - 1, emax, element.high
    added = {"ceil": (1 << 23) - 1, "even": 1 << (22 - mantissa), "even1": 1 << 21}
    return added.get(quant.rule, 0), emax, 0.0


def _blocks(weight: Tensor, quant: Quant, stored: dict[str, Tensor], given: bool = False) -> None:
    n, k = weight.shape
    codes, scale = stored.get("weight", stored.get("weight_packed")), stored["weight_scale"]
    assert codes is not None  # every layout without GGUF blocks has one of them
    width = k if quant.element.bits == 8 else codes.shape[1]
    add, emax, high = rule(quant) if quant.scale == "e8m0" else (int(given), 0, quant.element.half_range)
    factor = 1.0
    if quant.outer_block:
        factor = _global(weight, quant)
        stored["weight_global_scale"][0] = factor
    blocks.kernel(quant.format, quant.group_size, _KINDS[quant.scale], quant.searched)(
        *_source(weight),
        array(codes, quant.element.storage, n, width),
        width * codes.element_size(),
        array(scale, quant.scale_dtype, *quant.scale_shape(n, k)),
        scratch(weight, 3 * quant.group_size),
        add,
        emax,
        bits(high),
        bits(factor),
        int(quant.element.bits == 4 and k % 2 == 1),
    )


def _global(weight: Tensor, quant: Quant) -> float:
    """The factor of NVFP4's block scales, from the largest magnitude of the weight."""
    n = weight.shape[0]
    tops = torch.empty(n, dtype=torch.float32, device=weight.device)
    blocks.tops_kernel(*_source(weight), array(tops, torch.float32, n))
    return float(numerics.global_factor(tops.amax(), quant.element))
