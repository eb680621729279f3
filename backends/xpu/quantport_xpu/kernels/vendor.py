"""Weights of 4 and 8 bits with 16-bit activations, through ``vllm-xpu-kernels``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantport.backend import Canonical, Claim, Evidence, Kernel, Packed, Request, Scheme, WeightSpec
from quantport_xpu.kernels.weight_only import ZERO, Int4Groups
from quantport_xpu.vendor import PREFIX, SCHEMAS, SOURCE

_FP8 = "vllm-project/vllm-xpu-kernels csrc/xpu/onednn/fp8_gemm_w8a16.h at 07f4fbd668ca"
_INT4 = "vllm-project/vllm-xpu-kernels csrc/xpu/onednn/int4_gemm_w4a16.h at f8e6ad7c6f0c"


def vendor_reasons(request: Request, kernel: str, operator: str) -> tuple[str, ...]:
    """Why an operator of the package cannot be called: it is not here, or takes other activations."""
    reasons = []
    if PREFIX + operator not in request.device.features:
        reasons.append(f"{kernel} needs {operator}{SCHEMAS[operator]} of vllm-xpu-kernels, which was not found [{SOURCE}]")
    if request.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"{kernel} takes activations of 16 bits, not {request.dtype}")
    return tuple(reasons)


class XpuInt4W4A16(Int4Groups):
    """W4A16 through ``_xpu_C.int4_gemm_w4a16``: int4 in groups, without offsets, the bias in the same launch."""

    name = "xpu.int4_gemm_w4a16"

    def reasons_against(self, request: Request) -> Sequence[str]:
        reasons = [*super().reasons_against(request), *vendor_reasons(request, self.name, "int4_gemm_w4a16")]
        if request.dtype is torch.float16:
            reasons.append(f"{self.name} is tested by its vendor with scales in the dtype of the activations; ours are bfloat16")
        return reasons

    def claim(self, request: Request) -> Claim:
        """The vendor's source."""
        return Claim(Evidence.DECLARED, _INT4)

    def zeros(self, scale: Tensor) -> Tensor:
        """One code for all groups: int8 ``[1]``."""
        return torch.full((1,), ZERO, dtype=torch.int8, device=scale.device)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        if not len(x):
            return x.new_empty(0, spec.n)
        words, scale, zero = packed
        operator = torch.ops._xpu_C.int4_gemm_w4a16
        y: Tensor = operator(x, words.t(), bias, scale, zero, spec.scheme.weight.cols, None)
        return y


class XpuFp8W8A16(Kernel):
    """W8A16 through ``_xpu_C.fp8_gemm_w8a16``: e4m3fn with one scale, one for each output channel, or one for each 128x128."""

    name = "xpu.fp8_gemm_w8a16"
    tolerance = 2.0**-7

    def serves(self, scheme: Scheme) -> bool:
        quant = scheme.weight
        return quant.format == "e4m3fn" and quant.scale == "fp32" and (quant.rows, quant.cols) in ((0, 0), (1, 0), (128, 128))

    def reasons_against(self, request: Request) -> Sequence[str]:
        spec = request.weight
        reasons = list(vendor_reasons(request, self.name, "fp8_gemm_w8a16"))
        if spec.scheme.weight.cols and (spec.n % 128 or spec.k % 128 or spec.k < 256):
            shape = f"{spec.n} x {spec.k}"
            reasons.append(f"{self.name} needs N and K to be multiples of 128, and two blocks along K, not {shape} [{_FP8}]")
        return reasons

    def claim(self, request: Request) -> Claim:
        """The vendor's source."""
        return Claim(Evidence.DECLARED, _FP8)

    def pack(self, canonical: Canonical, spec: WeightSpec) -> Packed:
        scale = canonical["weight_scale"]
        return canonical["weight"].view(torch.uint8), scale.t().contiguous() if spec.scheme.weight.cols else scale.view(-1)

    def unpack(self, packed: Packed, spec: WeightSpec) -> Canonical:
        weight, scale = packed
        scale = scale.t().contiguous() if spec.scheme.weight.cols else scale.view(-1, 1)
        return {"weight": weight.view(torch.float8_e4m3fn), "weight_scale": scale}

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        if not len(x):
            return x.new_empty(0, spec.n)
        weight, scale = packed
        y: Tensor = torch.ops._xpu_C.fp8_gemm_w8a16(x, weight.view(torch.float8_e4m3fn).t(), scale, bias)
        return y
