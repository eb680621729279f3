"""int8 weights with scales for groups of columns, in fp16, bf16 or fp32, and with offsets: GPTQ in 8 bits.

Few rows meet the codes in compiled code, which sums each group before it is scaled; offsets meet the sums of
the activations of each group. More rows are multiplied by panels of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantport.backend import Packed, Reason, Request, Scheme, WeightSpec, numerics
from quantport_cpu.jit import why_unavailable
from quantport_cpu.jit.jobs import all_rows
from quantport_cpu.kernels.base import (
    CpuStacked,
    compiled_max_rows,
    multiply_by_panels,
    result_dtype,
    why_unavailable_on,
    with_bias,
)

_SCALES = ("fp32", "fp16", "bf16")
_STEP = 64  # the compiled code takes groups of a multiple of so many columns


class CpuInt8Groups(CpuStacked):
    """W8A16 of int8 with scales for groups, or with offsets."""

    name = "cpu.int8_groups"
    tolerance = 2.0**-7

    def serves(self, scheme: Scheme) -> bool:
        quant = scheme.weight
        own = (
            quant.group_size or quant.zero_point or quant.scale != "fp32"
        )  # `CpuInt8WeightOnly` has the rest
        by_rows = quant.block_shape[0] == 1 and quant.scale in _SCALES
        return quant.format == "int8" and bool(own) and by_rows and not quant.outer_block

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reason = why_unavailable_on(request.device)
        return [Reason(reason)] if reason else []

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        group = spec.scheme.weight.group_size or spec.k
        is_whole = group >= spec.k
        few = 0 < x.shape[0] <= compiled_max_rows() and not why_unavailable()
        # codes and offsets are summed apart: where they cancel, the rounding of FP32 activations is left
        few = few and not (spec.scheme.weight.zero_point and x.dtype is torch.float32)
        if few and (is_whole or group % _STEP == 0):
            y = self._few(x, packed, bias, spec, spec.k if is_whole else group)
        else:
            y = _by_panels(x, packed, spec)
        return with_bias(y, bias, x.dtype)

    @staticmethod
    def _few(x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec, group: int) -> Tensor:
        from quantport_cpu.jit import grouped_small_batch
        from quantport_cpu.jit.grouped_small_batch import Scales

        codes, scale, *zero = packed
        scales = Scales(groups=scale.float(), group=group)
        dtype = torch.float32 if zero else result_dtype(x.dtype, bias)
        y = grouped_small_batch.int8(x, all_rows(x.shape[0]), codes, scales, spec.n, dtype)
        return y.addmm_(_sums(x, group), zero[0].float().t()) if zero else y


def _sums(x: Tensor, group: int) -> Tensor:
    """The sums of the activations of each group: fp32 ``[M, groups]``."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % group))
    return padded.view(x.shape[0], -1, group).sum(2)


def _by_panels(x: Tensor, packed: Packed, spec: WeightSpec) -> Tensor:
    keys = spec.scheme.layout(spec.n, spec.k)

    def decode(r: int, panel: Tensor) -> Tensor:
        rows = {key: tensor[r : r + len(panel)] for key, tensor in zip(keys, packed, strict=True)}
        return panel.copy_(numerics.dequantize_weight(rows, plain, spec.k))

    plain = replace(spec.scheme, rotation=0)
    return multiply_by_panels(x, spec.n, spec.k, decode)
