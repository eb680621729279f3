"""GGUF blocks, weight-only: q4_0, q8_0, q4_k, q5_k and q6_k.

Weights stay as they are stored. Few rows of activations are multiplied in one pass over the blocks; for many,
panels of rows that stay in cache are decoded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantport.backend import Packed, Reason, Request, Scheme, WeightSpec
from quantport_cpu.kernels.base import CpuStacked, multiply_by_panels, why_unavailable_on

_SMALL_BATCH = 32  # up to this many rows, multiplying blocks beats decoding panels


class CpuGguf(CpuStacked):
    """W4A16 to W8A16 of GGUF blocks."""

    name = "cpu.gguf"
    tolerance = 2.0**-7
    made_of = "compiled on the machine by numba"

    def serves(self, scheme: Scheme) -> bool:
        return scheme.weight.element.block > 0

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reason = why_unavailable_on(request.device)
        return [Reason(reason)] if reason else []

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        from quantport_cpu.jit import gguf_batch

        (blocks,), name, rows = packed, spec.scheme.weight.format, x.shape[0]
        if not rows:
            y = x.new_zeros(0, spec.n, dtype=torch.float32)
        elif rows <= _SMALL_BATCH:
            y = gguf_batch.multiply(x, blocks, name)
        else:
            columns = gguf_batch.columns_of(blocks, name)
            y = multiply_by_panels(
                x,
                spec.n,
                columns,
                lambda r, panel: gguf_batch.decode(blocks[r : r + len(panel)], name, panel),
            )
        return (y if bias is None else y.add_(bias)).to(x.dtype)
