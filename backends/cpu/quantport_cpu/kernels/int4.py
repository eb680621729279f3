"""int4 groups in ATen's packed layout: compiled code for few rows of activations, ATen's for many."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quantport.backend import (
    Device,
    Packed,
    PackedLayout,
    PackedTensor,
    Reason,
    Refusal,
    Request,
    Scheme,
    StoredWeight,
    WeightSpec,
    aten,
)
from quantport_cpu.jit import why_unavailable
from quantport_cpu.jit.jobs import PER_TOKEN
from quantport_cpu.kernels.base import (
    COMPILED_MAX_ROWS,
    PANEL_ROWS,
    CpuGrouped,
    RowRange,
    has_bf16_dots,
    has_fast_dots,
    jobs_and_weights,
    select_weights,
    split_rows,
)
from quantport_cpu.kernels.int8 import quantize_per_token
from quantport_cpu.kernels.scratch import scratch

_GROUPS = (32, 64, 128, 256)  # columns that share a scale, as ATen's kernel takes them


def block_rows() -> int:
    """Output channels that ATen interleaves in one block; 0 where the layout is unknown.

    Source: pytorch ``aten/src/ATen/native/cpu/int4mm_kernel.cpp``, ``weight_to_int4pack_kernel``.
    """
    return {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 0)


def _block_of(device: Device) -> int:
    """``block_rows`` of this machine, or of a simulated device."""
    if not device.simulated:
        return block_rows()
    name = device.arch.name
    return 0 if not name.startswith("x86") else 32 if name == "x86_avx2" else 64


def _layout_reasons(device: Device) -> list[Reason]:
    """Reasons why weights cannot be packed for a device."""
    reasons = []
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        reasons.append(Reason("this torch has no _weight_int4pack_mm_for_cpu"))
    if not _block_of(device):
        reasons.append(Reason("the packed int4 layout is known for AVX2 and AVX-512 only"))
    return reasons


def _padded(spec: WeightSpec) -> tuple[int, int]:
    block, group = block_rows(), spec.scheme.weight.group_size
    return math.ceil(spec.n / block) * block, math.ceil(spec.k / group) * group


def pack_nibbles(nibbles: Tensor, block: int) -> Tensor:
    """Packs codes byte for byte as ``_convert_weight_to_int4pack_for_cpu`` does, without its int32 input.

    Args:
        nibbles: uint8 ``[n, k/2]``, code + 8, low nibble first; n a multiple of ``block``.
        block: From ``block_rows``.

    Returns:
        uint8 ``[n, k/2]``: for each block and column, byte j holds channel j and, high, channel ``j +
        block/2``.
    """
    n, half_k = nibbles.shape
    half = block // 2
    out = torch.empty(n // block, half_k, 2, half // 4, dtype=torch.int32, device=nibbles.device)
    wide = torch.empty(block, half_k, dtype=torch.int16, device=nibbles.device)
    for b in range(n // block):
        wide.copy_(nibbles[b * block : (b + 1) * block])
        for parity, code in enumerate((wide & 15, wide >> 4)):
            pair = torch.add(code[:half], code[half:], alpha=16)  # one byte: channels j and j + half
            two = torch.add(pair[0::2], pair[1::2], alpha=256)  # two bytes; int16 wraps, as wanted
            low = two.to(torch.int32).bitwise_and_(0xFFFF)
            out[b, :, parity].copy_(torch.add(low[0::2], low[1::2], alpha=65536).t())
    return out.view(torch.uint8).view(n, half_k)


def unpack_nibbles(packed: Tensor, block: int) -> Tensor:
    """The inverse of ``pack_nibbles``."""
    n, half_k = packed.shape
    u = packed.view(n // block, 2 * half_k, block // 2)
    q = torch.cat((u & 15, u >> 4), -1).transpose(1, 2).reshape(n, 2 * half_k)
    return q[:, 0::2] | (q[:, 1::2] << 4)


class CpuInt4(CpuGrouped):
    """W4A16. N and K are padded with zero weights to what the kernel takes."""

    name = "cpu.int4"
    tolerance = 2.0**-6

    def serves(self, scheme: Scheme) -> bool:
        quant = scheme.weight
        return (
            quant.format == "int4"
            and quant.block_shape[0] == 1
            and quant.group_size in _GROUPS
            and quant.scale == "bf16"
            and not quant.outer_block
        )

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reasons = _layout_reasons(request.device)
        if request.dtype is not torch.bfloat16:
            text = f"the packed int4 kernel is scalar for {request.dtype} activations; it takes bfloat16"
            reasons.append(Reason(text, Refusal.SLOWER))
        return reasons

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        n, k = _padded(spec)
        pairs = torch.zeros(
            k // spec.scheme.weight.group_size,
            n,
            2,
            dtype=torch.bfloat16,
            device=stored_weight["weight_scale"].device,
        )
        pairs[:, : spec.n, 0] = stored_weight["weight_scale"].t()
        if spec.scheme.weight.zero_point:
            pairs[:, : spec.n, 1] = stored_weight["weight_zero"].t()
        if not why_unavailable():
            from quantport_cpu.jit.quantize import pack_int4

            return pack_int4(stored_weight["weight_packed"], block_rows(), n, k), pairs
        nibbles = stored_weight["weight_packed"].view(torch.uint8)[:, : math.ceil(spec.k / 2)]
        missing = (0, k // 2 - nibbles.shape[1], 0, n - spec.n)
        if any(missing):
            nibbles = torch.nn.functional.pad(nibbles, missing)
        return pack_nibbles(nibbles, block_rows()), pairs

    def packed_layout(self, spec: WeightSpec) -> PackedLayout | None:
        if not block_rows():  # planning for a processor that is not this one
            return None
        n, k = _padded(spec)
        nibbles = PackedTensor((n, k // 2), torch.uint8, rows=0)
        pairs = PackedTensor((k // spec.scheme.weight.group_size, n, 2), torch.bfloat16, rows=1)
        return PackedLayout((nibbles, pairs), block_rows())

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        width = math.ceil(spec.k / 8) * 4  # bytes of whole int32 words
        nibbles = unpack_nibbles(packed[0], block_rows())[: spec.n]
        nibbles = torch.nn.functional.pad(nibbles, (0, max(0, width - nibbles.shape[1])))[:, :width]
        words = nibbles.clone(memory_format=torch.contiguous_format).view(torch.int32)
        scale, zero = (packed[1][:, : spec.n, i].t().contiguous() for i in (0, 1))
        return {"weight_packed": words, "weight_scale": scale} | (
            {"weight_zero": zero} if spec.scheme.weight.zero_point else {}
        )

    def small_group_rows(self, spec: WeightSpec) -> int:
        fits = (
            spec.scheme.weight.group_size % 64 == 0
            and not spec.scheme.weight.zero_point
            and block_rows() == 64
        )
        return COMPILED_MAX_ROWS if fits and has_fast_dots() else 0

    def run_small_groups(
        self, x: Tensor, groups: Sequence[RowRange], stack: Packed, spec: WeightSpec, shared: int
    ) -> Tensor:
        from quantport_cpu.jit import grouped_small_batch

        n, k = _padded(spec)
        x = x if k == spec.k else torch.nn.functional.pad(x, (0, k - spec.k))
        jobs, weights = jobs_and_weights(groups, shared, n)
        nibbles, pairs = select_weights(stack[0], weights), select_weights(stack[1], weights)
        group_size = spec.scheme.weight.group_size
        y = grouped_small_batch.int4(x, jobs, nibbles, pairs, group_size, shared * n)
        return y if n == spec.n else y.view(-1, shared, n)[..., : spec.n].reshape(-1, shared * spec.n)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        y = self._product(x, packed, spec).to(x.dtype)
        return y if bias is None else y.add_(bias)

    def _product(self, x: Tensor, packed: Packed, spec: WeightSpec) -> Tensor:
        """x times the weight: ``[M, N]``, fp32 or bf16, its own memory."""
        n, k = _padded(spec)
        if k != spec.k:
            x = torch.nn.functional.pad(x, (0, k - spec.k))
        group = spec.scheme.weight.group_size
        if 0 < x.shape[0] <= COMPILED_MAX_ROWS and group % 64 == 0 and block_rows() == 64 and has_fast_dots():
            from quantport_cpu.jit import small_batch

            y = split_rows(x, lambda part: small_batch.int4(part, packed[0], packed[1], group))
        elif (
            x.shape[0] > COMPILED_MAX_ROWS
            and x.dtype is torch.bfloat16
            and has_bf16_dots()
            and not why_unavailable()
        ):
            y = self._by_panels(x, packed, group)
        else:
            # it wants scales in the dtype of the activations; under autocast those may be FP16, which has not
            # the range of BF16 scales
            wide = torch.bfloat16 if x.dtype is torch.bfloat16 else torch.float32
            pairs = packed[1].to(wide)
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(wide), packed[0], group, pairs)
        return y if n == spec.n else y[:, : spec.n].contiguous()

    def _by_panels(self, x: Tensor, packed: Packed, group: int) -> Tensor:
        """Multiplies by panels of channels that are decoded to bf16: bf16 ``[M, N]``."""
        from quantport_cpu.jit import small_batch

        (codes, pairs), n = packed, packed[0].shape[0]
        y = x.new_empty(x.shape[0], n)
        for r in range(0, n, PANEL_ROWS[x.dtype]):
            panel = scratch(x, x.dtype, x.shape[1], min(PANEL_ROWS[x.dtype], n - r))
            small_batch.decode_int4(codes, pairs, group, block_rows(), r, panel)
            y[:, r : r + panel.shape[1]] = torch.mm(x, panel)
        return y


class CpuInt4Int8(CpuInt4):
    """W4A8: int8 activations per token, which bf16 holds exactly, times int4 groups; scales in fp32."""

    name = "cpu.int4_int8"
    quantizes_activations = True

    def serves(self, scheme: Scheme) -> bool:
        return super().serves(scheme) and scheme.activation == PER_TOKEN

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        return [*aten.native_reason(request, "int8"), *_layout_reasons(request.device)]

    def small_group_rows(self, spec: WeightSpec) -> int:
        return 0  # the launch for groups of few rows takes 16-bit activations

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        q, token = quantize_per_token(x)
        y = self._product(q.bfloat16(), packed, spec).float().mul_(token)
        return (y if bias is None else y.add_(bias)).to(x.dtype)
