"""int8 through oneDNN's VNNI matmul behind ``torch._int_mm``, on the weight as it is stored: nothing to pack.

oneDNN's prepacked linear is faster above a few rows, but its packing (``onednn.qlinear_prepack``) is a scalar loop of
several seconds per GB, which no load can afford.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantport.backend import Packed, Reason, Request, Scheme, WeightSpec, aten
from quantport_cpu.jit import available
from quantport_cpu.kernels.base import COMPILED, TINY, CpuGrouped, Few, by_group, compiled, jobs_of

_SINGLE = 3  # up to this many rows, one matrix-vector call for each beats one matmul
_COMPILED = 8  # up to this many rows the compiled kernel is fastest
_FEW = 16  # up to this many rows, ATen's W8A16 kernel beats three int8 matmuls
_DIGIT = 0x808080  # 128 in each of three base-256 digits
_FULL = 2.0**22 * 0.98  # largest magnitude of a row as a 23-bit integer; the margin keeps rounding inside three digits


def matmul(q: Tensor, weight: Tensor) -> Tensor:
    """Exact int32 ``q @ weight.T`` for int8 ``[M, K]`` and ``[N, K]``."""
    if 1 < q.shape[0] <= _SINGLE:
        return torch.cat([torch._int_mm(row, weight.t()) for row in q.split(1)])
    return torch._int_mm(q, weight.t())


def per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations per token: int8 ``[M, K]`` and fp32 ``[M, 1]``."""
    if not available():
        from quantport_cpu.jit.quantize import rows_int8

        return rows_int8(x)
    values = x.float()
    token = values.abs().amax(-1, keepdim=True).div_(127.5).clamp_min_(TINY)
    return (values / token).round_().clamp_max_(127).to(torch.int8), token


class _Int8(CpuGrouped):
    grouped = COMPILED  # rows of a group up to which one launch for all groups beats a matmul for each

    def limit(self, spec: WeightSpec) -> int:
        return self.grouped if compiled() else 0

    def few(self, x: Tensor, groups: Sequence[Few], packed: Sequence[Packed], spec: WeightSpec, shared: int) -> Tensor:
        from quantport_cpu.jit import grouped

        jobs, used = jobs_of(groups, shared, spec.n)
        y = grouped.int8(x, [grouped.Job(*j) for j in jobs], [packed[i][0] for i in used], shared * spec.n)
        return y.mul_(by_group([packed[i][1] for i in used], groups))

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reasons = list(aten.native_reason(request, "int8"))
        if request.weight.k == 1:
            reasons.append(Reason("torch._int_mm misreads the strides of a weight with one column"))
        return reasons


class CpuInt8(_Int8):
    """W8A8: per-token dynamic activations, exact int32 sums, scales in fp32."""

    name = "cpu.int8"
    grouped = 32
    tolerance = 2.0**-7
    quantizes_activations = True

    def serves(self, scheme: Scheme) -> bool:
        return scheme.weight.format == "int8" and scheme.activation is not None

    def few(self, x: Tensor, groups: Sequence[Few], packed: Sequence[Packed], spec: WeightSpec, shared: int) -> Tensor:
        q, token = per_token(x)  # once for all weights that share the rows
        return super().few(q.float(), groups, packed, spec, shared).mul_(token)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        weight, channel = packed
        q, token = per_token(x)
        if 0 < x.shape[0] <= _COMPILED and compiled():
            from quantport_cpu.jit import gemv

            y = gemv.int8(q.float(), weight)  # the same sums, read at the speed of memory
        else:
            y = matmul(q, weight).float()
        y = y.mul_(token).mul_(channel.view(-1))
        return (y if bias is None else y.add_(bias)).to(x.dtype)


class CpuInt8WeightOnly(_Int8):
    """W8A16. Few rows go through ATen's kernel; many through three exact int8 matmuls.

    For the latter each row becomes 23-bit integers, that is three balanced base-256 digits: the low three bytes of the
    integer + 0x808080, each less 128.
    """

    name = "cpu.int8_weight_only"
    tolerance = 2.0**-7

    def serves(self, scheme: Scheme) -> bool:
        return scheme.weight.format == "int8"

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        weight, channel = packed
        few = x.shape[0] <= _FEW and x.dtype is torch.bfloat16 and spec.k % 16 == 0  # ATen reads past the end otherwise
        if 0 < x.shape[0] <= _COMPILED and compiled():
            from quantport_cpu.jit import gemv

            y = gemv.int8(x, weight)
        else:
            y = self._few(x, weight) if few else self._many(x.float(), weight)
        y = y.mul_(channel.view(-1))
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    def _few(self, x: Tensor, weight: Tensor) -> Tensor:
        """ATen takes scales in bf16, which would round them: scales of one, and the real ones afterwards."""
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x, weight, x.new_ones(weight.shape[0]))
        return y.float()

    def _many(self, x: Tensor, weight: Tensor) -> Tensor:
        m, k = x.shape
        scale = x.abs().amax(-1, keepdim=True).div_(_FULL).clamp_min_(TINY)
        digits = (x / scale).round_().add_(_DIGIT).to(torch.int32).view(torch.uint8).view(m, k, 4)
        rows = digits.permute(2, 0, 1)[:3].reshape(3 * m, k).bitwise_xor_(128).view(torch.int8)
        y = torch._int_mm(rows, weight.t()).float()
        return y[2 * m :].mul_(256).add_(y[m : 2 * m]).mul_(256).add_(y[:m]).mul_(scale)
