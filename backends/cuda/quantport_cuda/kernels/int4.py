"""INT4 groups with bf16 activations through ``torch._weight_int4pack_mm`` ("tinygemm")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantport.backend import (
    Claim,
    Evidence,
    Kernel,
    Packed,
    PackedLayout,
    PackedTensor,
    Reason,
    Request,
    Scheme,
    StoredWeight,
    WeightSpec,
    numerics,
)

_SOURCE = "PyTorch aten/src/ATen/native/cuda/int4mm.cu at 05f814fecfca (compute capability 8.0 and later)"
_GROUPS = (32, 64, 128, 256)
_MAX_ELEMENTS = 2**31 - 1  # the kernel's indices are int32


def _tiles(k: int) -> int:
    """Number of tiles of 16 columns whose codes lie together: the most that the kernel takes, so that it
    loads up to 16 bytes at once.
    """
    return next(tiles for tiles in (8, 4, 2) if k % (16 * tiles) == 0)


def pack_tiles(codes: Tensor) -> Tensor:
    """Codes in the layout of ``torch.ops.aten._convert_weight_to_int4pack``, which has no CPU version.

    Args:
        codes: uint8 ``[n, k]``, 0 to 15; n a multiple of 8, k of 32.

    Returns:
        int32 ``[n / 8, k / (16 tiles), 32, tiles / 2]``, the operand of ``mma.m16n8k16`` in the order in
        which it is converted to bf16: a word of ``lane`` holds row ``lane / 4`` of 8, and its nibble ``4 p +
        i`` column ``8 i + 2 (lane % 4) + p`` of 32.
    """
    n, k = codes.shape
    tiles = _tiles(k)
    words = (
        codes.view(n // 8, 8, k // (16 * tiles), tiles // 2, 4, 4, 2)
        .permute(0, 2, 1, 5, 3, 6, 4)
        .reshape(-1, 8)
    )
    return numerics.pack_bits(words, 4).view(torch.int32).view(n // 8, k // (16 * tiles), 32, tiles // 2)


def unpack_tiles(packed: Tensor) -> Tensor:
    """The inverse of ``pack_tiles``."""
    rows, columns, _, half = packed.shape
    words = numerics.unpack_bits(packed.reshape(-1, 1).view(torch.uint8), 8, 4)
    return (
        words.view(rows, columns, 8, 4, half, 2, 4)
        .permute(0, 2, 1, 4, 6, 3, 5)
        .reshape(rows * 8, columns * half * 32)
    )


class CudaInt4Pack(Kernel):
    """W4A16: ``value = (q - 8) * scale + zero`` in bf16, rounded once, then bf16 tensor cores."""

    name = "cuda._weight_int4pack_mm"
    tolerance = 2.0**-7

    def serves(self, scheme: Scheme) -> bool:
        quant = scheme.weight
        return (
            quant.format == "int4"
            and quant.block_shape[0] == 1
            and quant.scale == "bf16"
            and not quant.outer_block
        )

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        spec, arch = request.weight, request.device.arch
        group = spec.scheme.weight.group_size
        reasons = []
        if "bf16" not in arch.native:
            reasons.append(
                Reason(
                    f"{arch.name} ({arch.title}) has no bf16 matrix instruction, which {self.name} "
                    f"uses [{_SOURCE}]"
                )
            )
        if request.dtype is not torch.bfloat16:
            reasons.append(Reason(f"{self.name} takes bfloat16 only, not {request.dtype}"))
        if group not in _GROUPS:
            reasons.append(
                Reason(f"{self.name} takes groups of {', '.join(map(str, _GROUPS))}, not of {group}")
            )
        elif spec.k % group or spec.n % 8:
            reasons.append(
                Reason(
                    f"{self.name} needs K to be a multiple of the group of {group}, and N of 8, not "
                    f"{spec.n} x {spec.k}"
                )
            )
        return reasons

    def claim(self, request: Request) -> Claim:
        """PyTorch's source, and the instruction."""
        return Claim(Evidence.DECLARED, f"{_SOURCE}; {request.device.arch.source}")

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        scale = stored_weight["weight_scale"]
        zero = stored_weight.get("weight_zero", torch.zeros_like(scale))
        codes = numerics.unpack_bits(stored_weight["weight_packed"].view(torch.uint8), spec.k, 4)
        return pack_tiles(codes), torch.stack((scale.t(), zero.t()), -1).contiguous()

    def packed_layout(self, spec: WeightSpec) -> PackedLayout | None:
        tiles = _tiles(spec.k)
        shape = (spec.n // 8, spec.k // (16 * tiles), 32, tiles // 2)
        pairs = PackedTensor((spec.k // spec.scheme.weight.group_size, spec.n, 2), torch.bfloat16, rows=1)
        return PackedLayout((PackedTensor(shape, torch.int32, rows=0), pairs), block=8)

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        codes, (scale, zero) = unpack_tiles(packed[0]), packed[1].unbind(-1)
        out = {
            "weight_packed": numerics.pack_bits(codes, 4).view(torch.int32),
            "weight_scale": scale.t().contiguous(),
        }
        return out | ({"weight_zero": zero.t().contiguous()} if spec.scheme.weight.zero_point else {})

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        max_rows, group = _MAX_ELEMENTS // max(spec.n, spec.k), spec.scheme.weight.group_size
        parts = [
            torch.ops.aten._weight_int4pack_mm(part, packed[0], group, packed[1])
            for part in x.split(max_rows)
            if len(part)
        ]
        if not parts:  # a launch of no programs is an error
            return x.new_empty(0, spec.n)
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y if bias is None else y.add_(bias)
