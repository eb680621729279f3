"""A stored weight as the arguments of a Triton kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from quantport.backend import Packed, WeightSpec, numerics, once

FORMATS = ("e4m3fn", "int8", "int4", "e2m1", "e2m3", "e3m2", "nf4", "fp4")
_WHOLE_ROW = 1 << 30  # columns of a group that is a row with an offset; without one, scales come last


class Stored(NamedTuple):
    """Arguments of a kernel for a weight: pointers, integers and compile-time constants."""

    tensors: dict[str, Tensor]
    numbers: dict[str, int]
    constants: dict[str, Any]

    @property
    def codes_per_word(self) -> int:
        """Codes in a word."""
        return int(self.constants["BYTES"] * 8 // self.constants["BITS"])


def stored(packed: Packed, spec: WeightSpec) -> Stored:
    """The arguments of ``quantport_triton.ops.decode`` for a weight in its stored layout.

    Args:
        packed: The tensors of ``Scheme.layout``, in its order.
        spec: Scheme and shape.
    """
    quant = spec.scheme.weight
    names = list(spec.scheme.layout(spec.n, spec.k))
    layout = dict(zip(names, packed, strict=True))
    codes, scale = packed[0], layout["weight_scale"]
    bits = quant.element.bits
    row_bytes = codes.shape[1] * codes.element_size()
    word_bytes = 3 if bits == 6 else 1 if row_bytes % 4 else 4
    # A kernel reads neither pointer where the scheme has no such tensor.
    zero = layout.get("weight_zero", layout.get("weight_scale_offset", scale))
    outer_names = ("weight_global_scale", "weight_outer_scale", "weight_scale_scale")
    outer = next((layout[name] for name in outer_names if name in layout), scale)
    table = _table(quant.format, codes) if quant.element.codebook else scale
    tensors = {"codes": codes, "scale": scale, "zero": zero, "outer": outer, "table": table}
    numbers = {"words_per_row": row_bytes // word_bytes, "groups_per_row": scale.shape[1]}
    constants = {
        "FORMAT": "table" if quant.element.codebook else quant.format,
        "BITS": bits,
        "BYTES": word_bytes,
        "SCALE_ROWS": quant.block_shape[0],
        "GROUP": quant.group_size or _WHOLE_ROW * quant.zero_point,
        "SCALE": "double" if quant.scale_quant else quant.scale,
        "OUTER": _outer(quant.outer_block, quant.group_size),
        "ZERO": quant.zero_point,
    }
    return Stored(tensors, numbers, constants)


def _outer(outer: tuple[int, int] | None, cols: int) -> int:
    """Groups that share an outer scale; 0 if there is none, -1 if one factor divides the whole weight."""
    return 0 if outer is None else -1 if outer == (0, 0) else outer[1] // cols


def _table(name: str, codes: Tensor) -> Tensor:
    """The 16 values of a code book and the 256 of quantized scales: fp32 ``[272]`` on the device of
    ``codes``.

    It is made once for each device, since a copy from the host would stall a forward and break the capture of
    a graph.
    """
    if isinstance(codes, FakeTensor):
        return codes.new_empty(272, dtype=torch.float32)
    return _table_on(name, codes.device)


@once
def _table_on(name: str, device: torch.device) -> Tensor:
    return torch.cat([numerics.codebook(name, device), numerics.codebook("dynamic8", device)])
