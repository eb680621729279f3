"""int8 weights as they are stored: nothing to pack.

Few rows go through a compiled kernel. Many go through oneDNN's int8 matmul behind ``torch._int_mm`` where its
sums are exact, and elsewhere through fp32 matmuls over panels of the weight, whose products of bytes are
exact too.

oneDNN's prepacked linear is faster above a few rows, but its packing (``onednn.qlinear_prepack``) is a scalar
loop of several seconds per GB, which no load can afford.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from quantport.backend import Packed, Quant, Reason, Refusal, Request, Scheme, WeightSpec, aten, once
from quantport_cpu.features import usable_features
from quantport_cpu.jit import available
from quantport_cpu.kernels.base import (
    COMPILED,
    TINY,
    CpuGrouped,
    Few,
    by_few,
    by_group,
    by_panels,
    has_fast_dots,
    jobs_of,
    some,
)

_SINGLE = 3  # up to this many rows, one matrix-vector call for each beats one matmul
_COMPILED = 8  # up to this many rows the compiled kernel is fastest
_WITHOUT_INT_MM = 32  # and up to this many, a few at a time, where the next best is fp32 panels
_FEW = 16  # up to this many rows, ATen's W8A16 kernel beats three int8 matmuls
PER_TOKEN = Quant("int8", (1, 0))
_DIGIT = 0x808080  # 128 in each of three base-256 digits
# largest magnitude of a row as a 23-bit integer; the margin keeps rounding inside three digits
_FULL = 2.0**22 * 0.98


@once
def int_mm_is_exact_and_fast() -> bool:
    """Whether oneDNN's int8 matmul is one of dot products here: elsewhere it is a loop, or saturates, which
    is tried too.

    Without VNNI it may add products in pairs that saturate at 16 bits: 127 * 127 * 64 becomes 8160 instead of
    1032256. Source: oneDNN ``dev_guide_int8_computations``.
    """
    if not {"avx512_vnni", "avx_vnni", "i8mm"} & usable_features():
        return False
    with _disable_current_modes():  # whatever is traced by whoever asks first
        largest = torch.full((32, 64), 127, dtype=torch.int8, device="cpu")
        return bool((torch._int_mm(largest, largest.t()) == 127 * 127 * 64).all())


def matmul(q: Tensor, weight: Tensor) -> Tensor:
    """fp32 ``q @ weight.T`` for int8 ``[M, K]`` and ``[N, K]``: sums of exact products, exact themselves
    where int32 has them.
    """
    if not takes_int_mm(weight):
        return panels(q.float(), weight)
    if 1 < q.shape[0] <= _SINGLE:
        return torch.cat([torch._int_mm(row, weight.t()) for row in q.split(1)]).float()
    return torch._int_mm(q, weight.t()).float()


def takes_int_mm(weight: Tensor) -> bool:
    """Whether ``torch._int_mm`` is the way for a weight; it misreads the strides of one with a single
    column.
    """
    return weight.shape[1] > 1 and int_mm_is_exact_and_fast()


def panels(x: Tensor, weight: Tensor) -> Tensor:
    """fp32 ``x @ weight.T`` for fp32 ``[M, K]`` and int8 ``[N, K]``."""
    return by_panels(x, weight.shape[0], lambda r, panel: panel.copy_(weight[r : r + len(panel)]))


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

    def serves(self, scheme: Scheme) -> bool:
        quant = scheme.weight
        return (
            quant.format == "int8"
            and quant.plain
            and quant.block_shape[0] <= 1
            and not quant.group_size
            and quant.scale == "fp32"
        )

    def limit(self, spec: WeightSpec) -> int:
        return 0 if available() else self.grouped if has_fast_dots() else _COMPILED

    def few(self, x: Tensor, groups: Sequence[Few], stack: Packed, spec: WeightSpec, shared: int) -> Tensor:
        from quantport_cpu.jit import grouped

        jobs, used = jobs_of(groups, shared, spec.n)
        y = grouped.int8(x, [grouped.Job(*j) for j in jobs], some(stack[0], used), shared * spec.n)
        return y.mul_(by_group(stack[1], used, groups, spec.n))

    def multiply_few(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """fp32 ``x @ weight.T`` by the compiled kernel, read at the speed of memory, or None where there are
        too many rows.
        """
        if available() or not 0 < x.shape[0] <= (
            _COMPILED if int_mm_is_exact_and_fast() else _WITHOUT_INT_MM
        ):
            return None
        from quantport_cpu.jit import gemv

        return by_few(x, lambda part: gemv.int8(part, weight))


class CpuInt8(_Int8):
    """W8A8: per-token dynamic activations, exact products, scales in fp32."""

    name = "cpu.int8"
    grouped = 32
    tolerance = 2.0**-7
    quantizes_activations = True

    def serves(self, scheme: Scheme) -> bool:
        return super().serves(scheme) and scheme.activation == PER_TOKEN

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        return aten.native_reason(request, "int8", Refusal.NOT_OFFERED)  # it would run, and win nothing

    def few(self, x: Tensor, groups: Sequence[Few], stack: Packed, spec: WeightSpec, shared: int) -> Tensor:
        q, token = per_token(x)  # once for all weights that share the rows
        return super().few(q.float(), groups, stack, spec, shared).mul_(token)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        weight, channel = packed
        q, token = per_token(x)
        y = self.multiply_few(q.float(), weight)
        y = (matmul(q, weight) if y is None else y).mul_(token).mul_(channel.view(-1))
        return (y if bias is None else y.add_(bias)).to(x.dtype)


class CpuInt8WeightOnly(_Int8):
    """W8A16. Few rows go through a compiled kernel or ATen's; many through three exact int8 matmuls, or fp32
    ones.

    For the former each row becomes 23-bit integers, that is three balanced base-256 digits: the low three
    bytes of the integer + 0x808080, each less 128.
    """

    name = "cpu.int8_weight_only"
    tolerance = 2.0**-7

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        return ()

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        weight, channel = packed
        # ATen reads past the end otherwise
        few = x.shape[0] <= _FEW and x.dtype is torch.bfloat16 and spec.k % 16 == 0
        y = self.multiply_few(x, weight)
        if y is None:
            y = self._few(x, weight) if few else self._many(x.float(), weight)
        y = y.mul_(channel.view(-1))
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    def _few(self, x: Tensor, weight: Tensor) -> Tensor:
        """ATen takes scales in bf16, which would round them: scales of one, and the real ones afterwards."""
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x, weight, x.new_ones(weight.shape[0]))
        return y.float()

    def _many(self, x: Tensor, weight: Tensor) -> Tensor:
        if not takes_int_mm(weight):
            return panels(x, weight)
        m, k = x.shape
        scale = x.abs().amax(-1, keepdim=True).div_(_FULL).clamp_min_(TINY)
        digits = (x / scale).round_().add_(_DIGIT).to(torch.int32).view(torch.uint8).view(m, k, 4)
        rows = digits.permute(2, 0, 1)[:3].reshape(3 * m, k).bitwise_xor_(128).view(torch.int8)
        y = torch._int_mm(rows, weight.t()).float()
        return y[2 * m :].mul_(256).add_(y[m : 2 * m]).mul_(256).add_(y[:m]).mul_(scale)
