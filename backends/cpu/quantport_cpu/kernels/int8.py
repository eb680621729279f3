"""int8 weights as they are stored: nothing to pack.

int8 activations, and few rows of 16-bit ones, go through compiled kernels. Many rows of the latter, and all
without numba, go through oneDNN's int8 matmul behind ``torch._int_mm`` where its sums are exact, and
elsewhere through fp32 matmuls over panels of the weight, whose products of bytes are exact too.

oneDNN's prepacked linear is faster above a few rows, but its packing (``onednn.qlinear_prepack``) is a scalar
loop of several seconds per GB, which no load can afford.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from quantport.backend import (
    CodedRows,
    Packed,
    Reason,
    Refusal,
    Request,
    RowFunction,
    Scheme,
    WeightSpec,
    aten,
    once,
)
from quantport_cpu.features import usable_features
from quantport_cpu.jit import why_unavailable
from quantport_cpu.jit.jobs import PER_TOKEN, Job, all_rows
from quantport_cpu.kernels.base import (
    TINY,
    CpuGrouped,
    RowRange,
    compiled_max_rows,
    has_bf16_dots,
    is_plain,
    jobs_of,
    multiply_by_panels,
    result_dtype,
    with_bias,
)

if TYPE_CHECKING:
    from quantport_cpu.jit.token_batch import Token

# Up to so many rows:
_MATRIX_VECTOR_ROWS = 3  # a matrix-vector call for each row beats one matmul
_ROWS_BEFORE_INT_MM = 16  # the compiled kernel, or ATen's, beats three int8 matmuls
_MAX_INT_MM_COLUMNS = 2**17 - 1  # 128 * 128 * that is below 2**31
_DIGIT_ZERO = 0x808080  # 128 in each of three base-256 digits
# The largest magnitude of a row as an integer; the margin keeps the rounding inside three digits.
_FULL_SCALE = 2.0**22 * 0.98


@once
def int_mm_is_exact_and_fast() -> bool:
    """Whether oneDNN multiplies int8 by dot products here. Elsewhere its matmul is a loop, or it saturates.

    Without VNNI it may add products in pairs that saturate at 16 bits: 127 * 127 * 64 becomes 8160 instead of
    1032256. Source: oneDNN ``dev_guide_int8_computations``.
    """
    if not {"avx512_vnni", "avx_vnni", "i8mm"} & usable_features():
        return False
    with _disable_current_modes():  # the first call may come from inside a trace
        largest = torch.full((32, 64), 127, dtype=torch.int8, device="cpu")
        return bool((torch._int_mm(largest, largest.t()) == 127 * 127 * 64).all())


def matmul(q: Tensor, weight: Tensor) -> Tensor:
    """fp32 ``q @ weight.T`` for int8 ``[M, K]`` and ``[N, K]``: products are exact, and so are int32 sums."""
    if not can_int_mm(weight.shape[1]):
        return matmul_by_panels(q.float(), weight)
    if 1 < q.shape[0] <= _MATRIX_VECTOR_ROWS:
        return torch.cat([torch._int_mm(row, weight.t()) for row in q.split(1)]).float()
    return torch._int_mm(q, weight.t()).float()


def can_int_mm(k: int) -> bool:
    """Whether to use ``torch._int_mm`` for K columns; it misreads the strides of a single one."""
    return 1 < k <= _MAX_INT_MM_COLUMNS and int_mm_is_exact_and_fast()


def matmul_by_panels(x: Tensor, weight: Tensor) -> Tensor:
    """fp32 ``x @ weight.T`` for ``[M, K]``, and int8 ``[N, K]``."""
    n, k = weight.shape
    return multiply_by_panels(x, n, k, lambda r, panel: panel.copy_(weight[r : r + len(panel)]))


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as int8 ``[M, K]`` with a scale for each token, fp32 ``[M, 1]``."""
    if not why_unavailable():
        from quantport_cpu.jit.quantize import rows_int8

        return rows_int8(x)
    values = x.float()
    token = values.abs().amax(-1, keepdim=True).div_(127.5).clamp_min_(TINY)
    return (values / token).round_().clamp_max_(127).to(torch.int8), token


class _Int8(CpuGrouped):
    """int8 weights with a scale for each channel, or one."""

    def serves(self, scheme: Scheme) -> bool:
        quant = scheme.weight
        return (
            quant.format == "int8"
            and quant.plain
            and quant.block_shape[0] <= 1
            and not quant.group_size
            and quant.scale == "fp32"
        )


class CpuInt8(_Int8):
    """W8A8: per-token dynamic activations, exact products, scales in fp32."""

    name = "cpu.int8"
    tolerance = 2.0**-7
    quantizes_activations = True

    def serves(self, scheme: Scheme) -> bool:
        return super().serves(scheme) and scheme.activation == PER_TOKEN

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        return aten.native_reason(request, "int8", Refusal.NOT_OFFERED)  # it would run, and win nothing

    def small_group_rows(self, spec: WeightSpec) -> int:
        return 0 if why_unavailable() else sys.maxsize

    def row_function(self, packed: Packed, spec: WeightSpec) -> RowFunction | None:
        if why_unavailable() or not is_plain(packed):
            return None
        from quantport_cpu.jit import grouped_small_batch

        return grouped_small_batch.int8_row(*packed)

    def run_one(self, token: Token, gate_up: Packed, down: Packed, spec: WeightSpec) -> Tensor:
        from quantport_cpu.jit import token_batch

        return token_batch.int8(token, gate_up, down)

    def run_small_groups(
        self, x: Tensor, groups: Sequence[RowRange], stack: Packed, spec: WeightSpec, shared: int
    ) -> Tensor:
        return _products(x, jobs_of(groups, shared, spec.n), stack, shared * spec.n).to(x.dtype)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        if why_unavailable() or not x.shape[0]:
            return self.run_codes(CodedRows(*quantize_per_token(x), x.dtype), packed, bias, spec)
        y = _products(x, all_rows(x.shape[0]), packed, spec.n, bias)
        return with_bias(y, bias, x.dtype)

    def run_codes(self, x: CodedRows, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        weight, channel = packed
        if why_unavailable() or not len(x.codes):
            y = matmul(x.codes, weight).mul_(x.scale).mul_(channel.view(-1))
        else:
            y = _products(x, all_rows(len(x.codes)), packed, spec.n, bias)
        return with_bias(y, bias, x.dtype)


def _products(
    x: Tensor | CodedRows, jobs: Sequence[Job], weights: Packed, width: int, bias: Tensor | None = None
) -> Tensor:
    """int8 activations times int8 weights by compiled code, see ``grouped_small_batch.int8_int8``; the bias
    is not added yet.
    """
    from quantport_cpu.jit import amx_batch, grouped_small_batch

    codes, channels = weights
    if amx_batch.takes(jobs, codes):
        return amx_batch.int8_int8(x, jobs, codes, channels, width)
    if isinstance(x, CodedRows):
        rows = grouped_small_batch.prepared_int8(x.codes, x.scale)
    else:
        rows = grouped_small_batch.quantized_int8(x)  # once for all weights that share them
    return grouped_small_batch.int8_int8(rows, jobs, codes, channels, width, result_dtype(x.dtype, bias))


class CpuInt8WeightOnly(_Int8):
    """W8A16: few rows by a compiled kernel or ATen's, many by bf16, by three exact int8 matmuls, or by fp32.

    For int8 matmuls each row becomes 23-bit integers, that is three balanced base-256 digits: the low three
    bytes of the integer + 0x808080, each less 128.
    """

    name = "cpu.int8_weight_only"
    tolerance = 2.0**-7

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        return ()

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        weight, channel = packed
        # for other K, ATen reads past the end
        is_for_aten = x.shape[0] <= _ROWS_BEFORE_INT_MM and x.dtype is torch.bfloat16 and spec.k % 16 == 0
        if 0 < x.shape[0] <= self.small_group_rows(spec):
            y = self._products(x, all_rows(x.shape[0]), packed, spec.n, bias)
        else:
            y = self._by_aten(x, weight) if is_for_aten else self._large_batch(x, weight)
            y = y.mul_(channel.view(-1))
        return with_bias(y, bias, x.dtype)

    def small_group_rows(self, spec: WeightSpec) -> int:
        if why_unavailable():
            return 0
        return _ROWS_BEFORE_INT_MM if self._splits_into_digits(spec.k) else compiled_max_rows()

    def row_function(self, packed: Packed, spec: WeightSpec) -> RowFunction | None:
        if why_unavailable() or not is_plain(packed):
            return None
        from quantport_cpu.jit import gemv_bytes, grouped_small_batch

        scales = grouped_small_batch.Scales(channels=packed[1])
        return grouped_small_batch.bytes_row(gemv_bytes.INT8, packed[0], scales)

    def run_one(self, token: Token, gate_up: Packed, down: Packed, spec: WeightSpec) -> Tensor:
        from quantport_cpu.jit import gemv_bytes, token_batch

        return token_batch.codes_of_a_byte(token, gate_up, down, gemv_bytes.INT8, False)

    def run_small_groups(
        self, x: Tensor, groups: Sequence[RowRange], stack: Packed, spec: WeightSpec, shared: int
    ) -> Tensor:
        return self._products(x, jobs_of(groups, shared, spec.n), stack, shared * spec.n).to(x.dtype)

    @staticmethod
    def _products(
        x: Tensor, jobs: Sequence[Job], weights: Packed, width: int, bias: Tensor | None = None
    ) -> Tensor:
        from quantport_cpu.jit import grouped_small_batch
        from quantport_cpu.jit.grouped_small_batch import Scales

        scales = Scales(channels=weights[1])
        return grouped_small_batch.int8(x, jobs, weights[0], scales, width, result_dtype(x.dtype, bias))

    @staticmethod
    def _splits_into_digits(k: int) -> bool:
        """Whether many rows go through three int8 matmuls, and not through bf16."""
        return not has_bf16_dots() and can_int_mm(k)

    def _by_aten(self, x: Tensor, weight: Tensor) -> Tensor:
        """Without scales: ATen's are bf16, which would round them, so that it gets ones."""
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x, weight, x.new_ones(weight.shape[0]))
        return y.float()

    def _large_batch(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self._splits_into_digits(weight.shape[1]):
            return matmul_by_panels(x, weight)
        (m, k), x = x.shape, x.float()
        scale = x.abs().amax(-1, keepdim=True).div_(_FULL_SCALE).clamp_min_(TINY)
        digits = (x / scale).round_().add_(_DIGIT_ZERO).to(torch.int32).view(torch.uint8).view(m, k, 4)
        rows = digits.permute(2, 0, 1)[:3].reshape(3 * m, k).bitwise_xor_(128).view(torch.int8)
        y = torch._int_mm(rows, weight.t()).float()
        return y[2 * m :].mul_(256).add_(y[m : 2 * m]).mul_(256).add_(y[:m]).mul_(scale)
