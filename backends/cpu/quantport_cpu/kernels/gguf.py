"""GGUF blocks: types of 32 and q4_k, q5_k and q6_k, with activations of 16 bits; of most of them with 8, in
blocks of their own.

Weights stay as they are stored. Few rows of 16-bit activations are multiplied in one pass over the blocks;
for many, panels of rows that stay in cache are decoded. Those of 8 bits are multiplied as integers, block by
block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantport.backend import Packed, Reason, Refusal, Request, Scheme, WeightSpec, aten, numerics
from quantport_cpu.kernels.base import CpuStacked, has_bf16_dots, multiply_by_panels, why_unavailable_on

_BY_INTEGERS = ("q4_0", "q8_0", "q4_k", "q5_k", "q6_k")
_TYPES = (*_BY_INTEGERS, "q4_1", "q5_0", "q5_1")
# Up to this many rows:
_SMALL_BATCH = 32  # multiplying blocks beats decoding panels
_EXACT_ROWS = 48  # products of integers beat those of bf16, where the processor has them


class CpuGguf(CpuStacked):
    """W4A16 to W8A16 of GGUF blocks."""

    name = "cpu.gguf"
    tolerance = 2.0**-7
    made_of = "compiled on the machine by numba"

    def serves(self, scheme: Scheme) -> bool:
        return scheme.weight.format in _TYPES

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


class CpuGgufInt8(CpuGguf):
    """W4A8 to W8A8 of GGUF blocks: integer products; of many rows, in bf16 where the processor has it."""

    name = "cpu.gguf_int8"
    quantizes_activations = True

    def serves(self, scheme: Scheme) -> bool:
        if scheme.weight.format not in _BY_INTEGERS:
            return False
        return super().serves(scheme) and scheme.activation == scheme.weight_only.option("a8").activation

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reasons = aten.native_reason(request, "int8", Refusal.NOT_OFFERED)
        return [*reasons, *super().reasons_against(request)]

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        from quantport_cpu.jit import gguf_batch

        (blocks,) = packed
        if not x.shape[0]:
            return x.new_zeros(0, spec.n)
        if x.shape[0] > _EXACT_ROWS and x.dtype is torch.bfloat16 and has_bf16_dots():
            values = numerics.quantized_values(x, spec.scheme.activation)
            return super().run(values.to(x.dtype), packed, bias, spec)
        y = gguf_batch.multiply_quantized(x, blocks, spec.scheme.weight.format)
        return (y if bias is None else y.add_(bias)).to(x.dtype)
