"""W8A8 FP8 with fp32 scales through ``torch._scaled_mm``: per token and channel, and in blocks of 128x128."""

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
    Quant,
    Reason,
    Refusal,
    Request,
    Scheme,
    StoredWeight,
    WeightSpec,
    aten,
)
from quantport_triton.quantize import quantize

BLAS = "PyTorch aten/src/ATen/native/cuda/ScaledBlas.cpp at 0174dfabc023"
_ROWS = (
    f"{BLAS} (compute capability 8.9, or 9.0 and later) and "
    "RowwiseScaledMM.cu at 01386a0dab6f (row-wise scales on 8.9, 9.x, 10.x, 11.x, 12.x)"
)
_BLOCKS = f"{BLAS}, _check_deepseek_support (compute capability 9.x, cublasLt 12.9 or later)"
NEW = ("sm_103", "sm_121")  # builds have code for them from CUDA 12.9 on (PyTorch cmake/Codegen.cmake)


def build_reasons(request: Request, name: str, feature: str = "cuda>=12.9") -> list[Reason]:
    """Why the build of torch lacks what a kernel needs; nothing for a simulated device, whose build is
    unknown.
    """
    device = request.device
    if device.simulated or feature in device.features:
        return []
    return [
        Reason(
            f"{name} needs a torch built for CUDA {feature.removeprefix('cuda>=')} or later on "
            f"{device.arch.name}"
        )
    ]


class CudaScaledMM(aten.ScaledMM):
    """``torch._scaled_mm`` with row scales: cuBLASLt on sm_90 from CUDA 12.9 on, else CUTLASS.

    Partial sums are added in fp32 (``use_fast_accum=False``); else Hopper's tensor cores keep about 14 bits
    of a sum (DeepSeek-V3, arXiv:2412.19437, section 3.3.2).
    """

    name = "cuda._scaled_mm"

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        """Adds that the row-wise kernel has code for sm_103 and sm_121 only in builds for CUDA 12.9 and
        later.
        """
        old = build_reasons(request, self.name) if request.device.arch.name in NEW else []
        return [*super().reasons_against(request), *old]

    def claim(self, request: Request) -> Claim:
        """PyTorch's own gate, and the instruction."""
        return Claim(Evidence.DECLARED, f"{_ROWS}; {request.device.arch.source}")

    def quantize(self, x: Tensor, quant: Quant) -> tuple[Tensor, Tensor]:
        q = quantize(x, quant)
        return q.codes, q.scale


class CudaScaledBlocks(Kernel):
    """128x128 blocks through cuBLASLt, on sm_90 only.

    N and K must be whole blocks: torch itself takes others, but its shape function
    (``_meta_registrations.py`` of 2.13) counts whole blocks. cuBLASLt reads the scales of a row of blocks
    with a stride that is a multiple of 16 bytes, which ``F.scaled_mm`` checks and ``torch._scaled_mm`` cannot
    express. For the same reason the rows of activations, whose scales are stored column by column, are padded
    to a multiple of four.
    """

    name = "cuda._scaled_mm_blocks"
    tolerance = 2.0**-6
    quantizes_activations = True

    def serves(self, scheme: Scheme) -> bool:
        return (scheme.weight, scheme.activation) == (Quant("e4m3fn", (128, 128)), Quant("e4m3fn", (1, 128)))

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        spec, arch = request.weight, request.device.arch
        reasons = list(aten.native_reason(request, "e4m3fn"))
        if not reasons and arch.name != "sm_90":
            reasons.append(
                Reason(f"torch multiplies 128x128 blocks on sm_90 only, not on {arch.name} [{BLAS}]")
            )
        reasons = reasons or build_reasons(request, self.name)
        if spec.n % 128 or spec.k % 128:
            # What cuBLASLt does with other blocks is not known.
            needs = f"{self.name} needs N and K to be multiples of 128, not {spec.n} x {spec.k}"
            reasons.append(Reason(needs, Refusal.UNSAFE))
        if not hasattr(torch.nn.functional, "scaled_mm"):
            reasons.append(Reason(f"{self.name} is torch.nn.functional.scaled_mm, of torch 2.10 and later"))
        return reasons

    def claim(self, request: Request) -> Claim:
        """PyTorch's own gate, and the instruction."""
        return Claim(Evidence.DECLARED, f"{_BLOCKS}; {request.device.arch.source}")

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        scale = stored_weight["weight_scale"]
        padded = torch.nn.functional.pad(scale, (0, -scale.shape[1] % 4))
        return stored_weight["weight"].view(torch.uint8), padded

    def packed_layout(self, spec: WeightSpec) -> PackedLayout | None:
        rows, columns = spec.scheme.weight.scale_shape(spec.n, spec.k)
        codes = PackedTensor((spec.n, spec.k), torch.uint8, rows=0)
        scale = PackedTensor((rows, columns + -columns % 4), torch.float32, rows=0)
        return PackedLayout((codes, scale))

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        weight, scale = packed
        columns = spec.scheme.weight.scale_shape(spec.n, spec.k)[1]
        return {"weight": weight.view(torch.float8_e4m3fn), "weight_scale": scale[:, :columns].contiguous()}

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        weight, scale = packed
        assert spec.scheme.activation is not None  # serves refuses it otherwise
        rows = x.shape[0]
        if rows % 4:
            x = torch.nn.functional.pad(x, (0, 0, 0, -rows % 4))
        q = quantize(x, spec.scheme.activation, transposed=True)
        functional = torch.nn.functional
        of_x, of_weight = functional.ScalingType.BlockWise1x128, functional.ScalingType.BlockWise128x128
        weight = weight.view(q.codes.dtype).t()
        y = functional.scaled_mm(q.codes, weight, q.scale, of_x, scale.t(), of_weight)[:rows]
        return (y if bias is None else y + bias).to(x.dtype)
