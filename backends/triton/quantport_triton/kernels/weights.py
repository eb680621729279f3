"""A stored weight as the arguments of a Triton kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from quantport.backend import Packed, WeightSpec, numerics, once

FORMATS = ("e4m3fn", "int8", "int4", "e2m1", "e2m3", "e3m2", "nf4", "fp4")


class Stored(NamedTuple):
    """Arguments: pointers, numbers and constants."""

    tensors: dict[str, Tensor]
    numbers: dict[str, int]
    constants: dict[str, Any]

    @property
    def per_word(self) -> int:
        """Codes in a word."""
        return int(self.constants["BYTES"] * 8 // self.constants["BITS"])


def stored(packed: Packed, spec: WeightSpec) -> Stored:
    """The arguments of ``quantport_triton.ops.decode`` for a weight in its stored layout.

    Args:
        packed: What ``Kernel.pack`` returns where nothing overrides it: codes, scales, and what else the
            scheme has.
        spec: Scheme and shape.
    """
    quant = spec.scheme.weight
    names = list(spec.scheme.layout(spec.n, spec.k))
    held = dict(zip(names, packed, strict=True))
    codes, scale = packed[0], held["weight_scale"]
    bits = quant.element.bits
    row = codes.shape[1] * codes.element_size()
    size = 3 if bits == 6 else 1 if row % 4 else 4
    zero = held.get("weight_zero", held.get("weight_scale_offset", scale))
    outer = held.get(
        "weight_global_scale", held.get("weight_outer_scale", held.get("weight_scale_scale", scale))
    )
    table = _table(quant.format, codes) if quant.element.codebook else scale
    tensors = {"codes": codes, "scale": scale, "zero": zero, "outer": outer, "table": table}
    numbers = {"words_per_row": row // size, "groups_per_row": scale.shape[1]}
    constants = {
        "FORMAT": "table" if quant.element.codebook else quant.format,
        "BITS": bits,
        "BYTES": size,
        "SCALE_ROWS": quant.block_shape[0],
        "GROUP": quant.group_size,
        "SCALE": "double" if quant.scale_quant else quant.scale,
        "OUTER": _outer(quant.outer_block, quant.group_size),
        "ZERO": quant.zero_point,
    }
    return Stored(tensors, numbers, constants)


def _outer(outer: tuple[int, int] | None, cols: int) -> int:
    """Groups that share an outer scale; -1 where one factor divides everything, 0 where there is none."""
    return 0 if outer is None else -1 if outer == (0, 0) else outer[1] // cols


def _table(name: str, codes: Tensor) -> Tensor:
    """Values of a code book, and of the 8-bit code of its scales: fp32 ``[272]`` on the device of ``codes``.

    Kept for each device, since copying it there would stop a forward, and a graph that is captured; a fake
    one is not kept.
    """
    return (
        codes.new_empty(272, dtype=torch.float32)
        if isinstance(codes, FakeTensor)
        else _kept(name, codes.device)
    )


@once
def _kept(name: str, device: torch.device) -> Tensor:
    return torch.cat([numerics.codebook(name, device), numerics.codebook("dynamic8", device)])
