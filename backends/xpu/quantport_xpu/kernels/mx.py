"""MX formats through ``vllm-xpu-kernels`` and Intel's extension. No known Intel GPU multiplies blocks with
e8m0 scales.
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
    Quant,
    Reason,
    ReasonCode,
    Refusal,
    Request,
    Scheme,
    Status,
    StoredWeight,
    WeightSpec,
    aten,
    numerics,
)
from quantport_xpu.kernels.vendor import vendor_reasons

_KERNELS = "vllm-project/vllm-xpu-kernels"
_FP8 = (
    f"{_KERNELS} csrc/xpu/onednn/fp8_gemm_w8a8.h at dda91d171fbc, test_mxfp8_gemm (e8m0 scales [K / 32, N])"
)
_FP4 = (
    f"{_KERNELS} csrc/xpu/onednn/fp4_gemm_w4a4.h at 67928905bfbd; vllm-project/vllm "
    "XPUMxFp4LinearKernel (scales [K / 32, N])"
)
_QUANTIZER = f"{_KERNELS} csrc/quantization/fp4/mxfp4_quant.h at 18fe6526b40a"
_MARLIN = (
    "intel/intel-extension-for-pytorch XEGEMM_MXFP4_marlin.cpp and test_marlin_mxfp4_linear.py at "
    "acaa1016cdba"
)
_E2M1 = ("Xe-HPC", "Xe2", "Xe3", "Xe3p")  # families with e2m1 in oneDNN's table, if only by conversion
SMALLEST_SCALE = 2.0**-126


def is_mx(quant: Quant | None, name: str) -> bool:
    """Whether an operand has a power-of-two scale for each 32 along K and no other."""
    if quant is None:
        return False
    levels = (quant.format, quant.block_shape[0], quant.group_size, quant.scale, quant.outer_block)
    return levels == (name, 1, 32, "e8m0", None)


def block_reason(request: Request, kernel: str) -> tuple[Reason, ...]:
    """The reason against a partial block; empty for whole ones.

    A K below 32 may work, as one scale for a row, but is not tested by the vendor.
    """
    k = request.weight.k
    kind = Refusal.UNSAFE if k < 32 else Refusal.IMPOSSIBLE
    return (Reason(f"{kernel} needs K to be a multiple of 32, not {k}", kind),) if k % 32 else ()


def _shuffled(weight: Tensor, shape: tuple[int, int]) -> Tensor:
    """Packed 4-bit codes, bytes ``[n, k / 2]``, with each eight codes transposed as a matrix of ``shape``."""
    n, half = weight.shape
    codes = numerics.unpack_bits(weight, 2 * half, 4).view(n, -1, *shape)
    return numerics.pack_bits(codes.transpose(2, 3).reshape(n, -1), 4)


class _Mx(aten.Quantizing):
    """MX weights and activations in one format. It is an emulation: oneDNN converts both before it
    multiplies.
    """

    status = Status.REFERENCE
    tolerance = 2.0**-6
    element = ""
    operators: tuple[str, ...] = ()

    def serves(self, scheme: Scheme) -> bool:
        return is_mx(scheme.weight, self.element) and is_mx(scheme.activation, self.element)

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        return [*vendor_reasons(request, self.name, *self.operators), *block_reason(request, self.name)]

    def slow(self, request: Request) -> str:
        arch, scheme = request.device.arch, request.weight.scheme
        unit = scheme.activation.unit if scheme.activation else ""
        return (
            f"{arch.name} has no {unit} matrix instruction [{arch.source}], and activations are "
            "quantized first"
        )

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        weight, scale = super().pack(stored_weight, spec)
        return weight, scale.t().contiguous()

    def packed_layout(self, spec: WeightSpec) -> PackedLayout | None:
        codes, scale = self.stored_layout(spec)
        return PackedLayout((codes, PackedTensor(scale.shape[::-1], scale.dtype, rows=1)))

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        return super().unpack((packed[0], packed[1].t().contiguous()), spec)

    def quantize(self, x: Tensor, quant: Quant) -> tuple[Tensor, Tensor]:
        """Codes as the operator takes them, and e8m0 scales ``[M, K / 32]``."""
        codes, token = super().quantize(x, quant)
        return codes, token.view(torch.float8_e8m0fnu)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        if not len(x):
            return x.new_empty(0, spec.n)
        weight, scale = packed
        assert spec.scheme.activation is not None  # serves refuses it otherwise
        q = self.quantize(x, spec.scheme.activation)
        return self.multiply(q, (weight, scale.view(q[1].dtype)), x.dtype, bias)

    @abstractmethod
    def multiply(self, q: Packed, packed: Packed, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        """Calls the operator on codes and scales of both operands, for a result in ``dtype``."""


class XpuMxfp8(_Mx):
    """W8A8 in MXFP8 through ``_xpu_C.fp8_gemm`` with e8m0 scales: the values of MXFP8, multiplied in a wider
    type.
    """

    name = "xpu.fp8_gemm_mx"
    element = "e4m3fn"
    operators = ("_xpu_C.fp8_gemm",)

    def claim(self, request: Request) -> Claim:
        """The vendor's source and test."""
        return Claim(Evidence.DECLARED, _FP8)

    def multiply(self, q: Packed, packed: Packed, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        (codes, token), (weight, scale) = q, packed
        y: Tensor = torch.ops._xpu_C.fp8_gemm(codes, weight.view(codes.dtype).t(), dtype, token, scale, bias)
        return y


class XpuMxfp4(_Mx):
    """W4A4 in MXFP4 through ``_xpu_C.fp4_gemm``: the values of MXFP4, multiplied in a wider type."""

    name = "xpu.fp4_gemm"
    element = "e2m1"
    operators: tuple[str, ...] = ("_xpu_C.fp4_gemm",)

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        """Adds that oneDNN has no e2m1 on older GPUs."""
        reasons, arch = list(super().reasons_against(request)), request.device.arch
        if arch.family not in _E2M1:
            text = f"{self.name}: oneDNN has no e2m1 on {arch.name} [{arch.source}]"
            reasons.append(Reason(text, code=ReasonCode.NO_MATRIX_INSTRUCTION))
        return reasons

    def claim(self, request: Request) -> Claim:
        """The vendor's source, and vLLM's use of it."""
        return Claim(Evidence.DECLARED, _FP4)

    def quantize(self, x: Tensor, quant: Quant) -> tuple[Tensor, Tensor]:
        """Two codes to a byte, the first in the low half: ``[M, K / 2]``."""
        codes, token = super().quantize(x, quant)
        return numerics.pack_bits(codes, 4), token

    def multiply(self, q: Packed, packed: Packed, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        codes, weight = (pair[0].view(torch.float4_e2m1fn_x2) for pair in (q, packed))
        y: Tensor = torch.ops._xpu_C.fp4_gemm(codes, weight.t(), q[1], packed[1], dtype, bias)
        return y


class XpuMxfp4Quantized(XpuMxfp4):
    """W4A4 in ``mxfp4:rceil`` as vLLM runs it: ``_C.per_token_group_quant_mxfp4`` quantizes activations in
    one launch.

    Its scales are those of ``rceil``. Ties go toward zero, since its comparisons with the midpoints are
    strict.
    """

    name = "xpu.fp4_gemm_quantized"
    numeric_deviation = "ties of activations go toward zero"
    operators = (*XpuMxfp4.operators, "_C.per_token_group_quant_mxfp4")

    def serves(self, scheme: Scheme) -> bool:
        return super().serves(scheme) and scheme.activation is not None and scheme.activation.rule == "rceil"

    def claim(self, request: Request) -> Claim:
        """The vendor's sources, and vLLM's use of them."""
        return Claim(Evidence.DECLARED, f"{_FP4}; {_QUANTIZER}")

    def quantize(self, x: Tensor, quant: Quant) -> tuple[Tensor, Tensor]:
        m, k = x.shape
        codes, scale = x.new_empty(m, k // 2, dtype=torch.uint8), x.new_empty(m, k // 32, dtype=torch.float32)
        torch.ops._C.per_token_group_quant_mxfp4(x, codes, scale, 32, SMALLEST_SCALE)
        return codes, scale.to(torch.float8_e8m0fnu)


class XpuMxfp4Marlin(Kernel):
    """W4A16 in MXFP4 through ``torch_ipex.mm_mxfp4_out_marlin`` of Intel's archived extension: codes become
    bf16 in registers.
    """

    name = "xpu.mm_mxfp4_marlin"
    tolerance = 2.0**-7
    numeric_deviation = "a scale of 2**-127 is read as zero"  # its byte becomes the exponent of a bf16

    def serves(self, scheme: Scheme) -> bool:
        return is_mx(scheme.weight, "e2m1")

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        spec, arch = request.weight, request.device.arch
        reasons = list(vendor_reasons(request, self.name, "torch_ipex.mm_mxfp4_out_marlin.xpu"))
        if arch.family != "Xe-HPC":
            reasons.append(
                Reason(
                    f"{self.name} is written for Xe-HPC, not for {arch.family} [{_MARLIN}]", Refusal.UNSAFE
                )
            )
        if request.dtype is not torch.bfloat16:
            reasons.append(
                Reason(f"{self.name} reads activations as bfloat16, whatever they are: not {request.dtype}")
            )
        if spec.n % 128 or spec.k % 128:
            tested = (
                f"{self.name} is tested by its vendor with N and K that are multiples of 128, not "
                f"{spec.n} x {spec.k}"
            )
            reasons.append(Reason(tested, Refusal.UNSAFE))
        return reasons

    def claim(self, request: Request) -> Claim:
        """The vendor's source and test."""
        return Claim(Evidence.DECLARED, _MARLIN)

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        """Words of eight codes, in the order 0 4 1 5 2 6 3 7 from the lowest nibble: int32 ``[K / 8, N]``."""
        words = _shuffled(stored_weight["weight_packed"], (2, 4)).view(torch.int32)
        return words.t().contiguous(), stored_weight["weight_scale"].t().contiguous()

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        words, scale = (t.t().contiguous() for t in packed)
        return {"weight_packed": _shuffled(words.view(torch.uint8), (4, 2)), "weight_scale": scale}

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        y = x.new_empty(len(x), spec.n)
        if len(x):
            torch.ops.torch_ipex.mm_mxfp4_out_marlin.xpu(y, x, *packed, 32)
        return y if bias is None else y.add_(bias)
