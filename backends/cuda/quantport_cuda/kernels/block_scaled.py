"""MXFP8, MXFP4 and NVFP4 through the block-scaled tensor cores of Blackwell, by ``torch._scaled_mm``.

The scales of weights and activations are in the order that cuBLASLt reads. torch does not check the
architecture, and older ones fail inside cuBLASLt, so this room checks it
(``torch/testing/_internal/common_cuda.py``: compute capability 10.0 and later).
"""

from __future__ import annotations

from abc import abstractmethod
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
    aten,
)
from quantport_cuda.kernels.scaled import BLAS, NEW, build_reasons
from quantport_triton.quantize import Quantized, quantize, swizzled, unswizzled

_GATE = (
    "torch 2.15.0 torch/testing/_internal/common_cuda.py, PLATFORM_SUPPORTS_MX_GEMM (compute "
    "capability 10.0 and later)"
)
_DTYPES = {"e4m3fn": torch.float8_e4m3fn, "e8m0": torch.float8_e8m0fnu, "e2m1": torch.float4_e2m1fn_x2}


class _BlockScaled(Kernel):
    """Weights and activations in one block format, from sm_100 on; N a multiple of 16, K of 32."""

    tolerance = 2.0**-6
    quantizes_activations = True

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        spec, activation = request.weight, request.weight.scheme.activation
        assert activation is not None  # serves refused it otherwise
        reasons = list(aten.native_reason(request, activation.unit))
        if not reasons:
            reasons += build_reasons(
                request, self.name, "cuda>=12.9" if request.device.arch.name in NEW else "cuda>=12.8"
            )
        if spec.n % 16 or spec.k % 32:
            reasons.append(
                Reason(f"{self.name} needs N to be a multiple of 16 and K of 32, not {spec.n} x {spec.k}")
            )
        return reasons

    def claim(self, request: Request) -> Claim:
        """PyTorch's own gate, and the instruction."""
        return Claim(Evidence.DECLARED, f"{BLAS}; {_GATE}; {request.device.arch.source}")

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        codes, scale, *rest = super().pack(stored_weight, spec)
        return codes, swizzled(scale.view(torch.uint8)).flatten(), *rest

    def packed_layout(self, spec: WeightSpec) -> PackedLayout | None:
        _, groups = spec.scheme.weight.scale_shape(spec.n, spec.k)
        codes, _, *rest = self.stored_layout(spec)
        scale = PackedTensor((-(-spec.n // 128) * 128 * -(-groups // 4) * 4,), torch.uint8, rows=0)
        return PackedLayout((codes, scale, *rest), block=128)

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        codes, scale, *rest = packed
        shape = spec.scheme.weight.scale_shape(spec.n, spec.k)
        return super().unpack((codes, unswizzled(scale, *shape), *rest), spec)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        assert spec.scheme.activation is not None  # serves refused it otherwise
        y = self.multiply(quantize(x, spec.scheme.activation, swizzle=True), packed, spec)
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    @abstractmethod
    def multiply(self, x: Quantized, packed: Packed, spec: WeightSpec) -> Tensor:
        """Quantized activations times the packed weight: bf16 ``[M, N]``."""


def _operands(x: Quantized, packed: Packed, spec: WeightSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both operands and their scales, in the dtypes by which torch tells formats apart."""
    quant = spec.scheme.weight
    codes, scale = _DTYPES[quant.format], _DTYPES[quant.scale]
    return x.codes.view(codes), packed[0].view(codes).t(), x.scale.view(scale), packed[1].view(scale)


class CudaScaledMX(_BlockScaled):
    """MXFP8, and MXFP4 where torch is built with MSLK (cuBLASLt multiplies no MXFP4), on sm_100 and
    sm_103.
    """

    name = "cuda._scaled_mm_mx"

    def serves(self, scheme: Scheme) -> bool:
        weight, activation = scheme.weight, scheme.activation
        if activation is None or weight.outer_block or weight.format not in ("e4m3fn", "e2m1"):
            return False
        return activation.unit == weight.unit and weight.scale == "e8m0"

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        """Adds what torch needs for MXFP4."""
        reasons, arch = list(super().reasons_against(request)), request.device.arch
        if "mxfp4" in arch.native and request.weight.scheme.weight.format == "e2m1":
            if arch.name not in ("sm_100", "sm_103"):
                reasons.append(
                    Reason(
                        f"torch multiplies mxfp4 on compute capability 10.x only, not on {arch.name} [{BLAS}]"
                    )
                )
            if "mslk" not in request.device.features:
                reasons.append(Reason(f"torch multiplies mxfp4 only when built with MSLK [{BLAS}]"))
            if not hasattr(torch.nn.functional, "scaled_mm"):
                reasons.append(Reason("torch multiplies mxfp4 from 2.10 on"))
        return reasons

    def multiply(self, x: Quantized, packed: Packed, spec: WeightSpec) -> Tensor:
        a, b, token, scale = _operands(x, packed, spec)
        if spec.scheme.weight.format == "e4m3fn":
            return torch._scaled_mm(a, b, scale_a=token, scale_b=scale, out_dtype=torch.bfloat16)
        functional = torch.nn.functional
        recipe, order = functional.ScalingType.BlockWise1x32, functional.SwizzleType.SWIZZLE_32_4_4
        y: Tensor = functional.scaled_mm(
            a, b, token, recipe, scale, recipe, order, order, output_dtype=torch.bfloat16
        )
        return y


class CudaScaledNV(_BlockScaled):
    """NVFP4. torch takes one outer factor for each operand, and here each token has one, so the output is
    divided by the factors afterwards. Sums without them reach 1e12, which bf16 holds.
    """

    name = "cuda._scaled_mm_nvfp4"

    def serves(self, scheme: Scheme) -> bool:
        weight, activation = scheme.weight, scheme.activation
        return (
            activation is not None
            and weight.unit == activation.unit == "nvfp4"
            and activation.outer_block == (1, 0)
        )

    def multiply(self, x: Quantized, packed: Packed, spec: WeightSpec) -> Tensor:
        assert x.outer is not None
        a, b, token, scale = _operands(x, packed, spec)
        y = torch._scaled_mm(a, b, scale_a=token, scale_b=scale, out_dtype=torch.bfloat16)
        # One factor after the other, since their product may overflow.
        return y.mul_(x.outer.reciprocal().div_(packed[2]))
