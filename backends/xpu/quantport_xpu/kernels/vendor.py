"""int4 and fp8 through ``vllm-xpu-kernels``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantport.backend import (
    Claim,
    CodedRows,
    Evidence,
    Kernel,
    Packed,
    PackedLayout,
    PackedTensor,
    Quant,
    Reason,
    Refusal,
    Rejected,
    Request,
    Scheme,
    StoredWeight,
    Verdict,
    WeightSpec,
    aten,
)
from quantport_xpu.kernels.weight_only import ZERO, Int4Groups
from quantport_xpu.vendor import missing

_FP8 = "vllm-project/vllm-xpu-kernels csrc/xpu/onednn/fp8_gemm_w8a16.h at 07f4fbd668ca"
_W8A8 = "vllm-project/vllm-xpu-kernels csrc/xpu/onednn/fp8_gemm_w8a8.h at 09c5374b2427"
_W4A8 = "vllm-project/vllm-xpu-kernels csrc/xpu/onednn/int4_gemm_w4a8.h at 7671b1ca729f"
_W4A8_USE = (
    "vllm-project/vllm INCXPUW4A8LinearMethod (scales in fp16, the int8 datapath) and XPUW4A8IntLinearKernel"
)
_INT4 = "vllm-project/vllm-xpu-kernels csrc/xpu/onednn/int4_gemm_w4a16.h at f8e6ad7c6f0c"


def vendor_reasons(
    request: Request, kernel: str, *operators: str, wide: Refusal = Refusal.IMPOSSIBLE
) -> tuple[Reason, ...]:
    """Why a kernel cannot call its operators: they are not here, or do not take these activations.

    Args:
        request: The request.
        kernel: Name of the kernel.
        operators: Keys of ``vendor.SCHEMAS``.
        wide: The kind of the refusal of activations of other than 16 bits.
    """
    reasons = [Reason(missing(name, kernel)) for name in operators if name not in request.device.features]
    if request.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(Reason(f"{kernel} takes activations of 16 bits, not {request.dtype}", wide))
    return tuple(reasons)


class XpuInt4W4A16(Int4Groups):
    """W4A16 through ``_xpu_C.int4_gemm_w4a16``: int4 in groups without offsets, with the bias in the same
    launch.
    """

    name = "xpu.int4_gemm_w4a16"

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reasons = [
            *super().reasons_against(request),
            *vendor_reasons(request, self.name, "_xpu_C.int4_gemm_w4a16"),
        ]
        if request.dtype is torch.float16:
            reasons.append(
                Reason(
                    f"{self.name} is tested by its vendor with scales in the dtype of the "
                    "activations; ours are bfloat16"
                )
            )
        return reasons

    def claim(self, request: Request) -> Claim:
        """The vendor's source."""
        return Claim(Evidence.DECLARED, _INT4)

    def packed_layout(self, spec: WeightSpec) -> PackedLayout | None:
        words, scale = self.stored_layout(spec)
        turned = PackedTensor(scale.shape[::-1], scale.dtype, rows=1)
        return PackedLayout((words, turned, PackedTensor((1,), torch.int8, rows=None)))

    def zeros(self, scale: Tensor) -> Tensor:
        """One code for all groups: int8 ``[1]``."""
        return torch.full((1,), ZERO, dtype=torch.int8, device=scale.device)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        if not len(x):
            return x.new_empty(0, spec.n)
        words, scale, zero = packed
        operator = torch.ops._xpu_C.int4_gemm_w4a16
        y: Tensor = operator(x, words.t(), bias, scale, zero, spec.scheme.weight.group_size, None)
        return y


class XpuInt4W4A8(XpuInt4W4A16, aten.Quantizing):
    """W4A8 through ``_xpu_C.int4_gemm_w4a8``: XMX multiplies int8, to which the operator converts the codes.

    The operator reads all scales as fp16 and returns fp16. So the weight scales that it gets are multiplied
    by a power of two that brings the largest into [1, 2), and all tokens get one scale, a power of two with
    which no sum overflows. The scales of the tokens are applied afterwards, in fp32.
    """

    name = "xpu.int4_gemm_w4a8"

    def serves(self, scheme: Scheme) -> bool:
        return super().serves(scheme) and scheme.activation == Quant("int8", (1, 0))

    def verdict(self, request: Request) -> Verdict:
        """Refuses stored zero points of activations, which it does not see otherwise."""
        activation = request.weight.scheme.activation
        if activation is not None and activation.static and activation.zero_point:
            text = f"{self.name} returns fp16, in which what a zero point adds drowns the rest"
            return Rejected(self.name, (Reason(text, Refusal.NOT_OFFERED),))
        return super().verdict(request)

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        spec = request.weight
        # It returns fp16, which is too little for activations in fp32.
        lacking = vendor_reasons(request, self.name, "_xpu_C.int4_gemm_w4a8", wide=Refusal.NOT_OFFERED)
        reasons = [*Int4Groups.reasons_against(self, request), *lacking]
        if spec.n % 8:
            reasons.append(Reason(f"{self.name} needs N to be a multiple of 8, not {spec.n} [{_W4A8_USE}]"))
        return [*aten.native_reason(request, "int8"), *reasons]

    def claim(self, request: Request) -> Claim:
        """The vendor's source, vLLM's use of it, and the instruction."""
        return Claim(Evidence.DECLARED, f"{_W4A8}; {_W4A8_USE}; {request.device.arch.source}")

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        """Adds to what W4A16 packs: the scales in fp16, the factor that the output lacks, and the scale that
        all tokens get.
        """
        words, scale, zero = super().pack(stored_weight, spec)
        values = scale.float()
        largest = torch.where(torch.isfinite(values), values, 0).amax()
        exponent = torch.frexp(largest).exponent - 1
        exponent = exponent.float()  # older torch takes a power of integers in the default dtype
        half = torch.ldexp(values, -exponent).half()
        # Sums are below 128 * 8 * 2 * K; the scale brings them below 2**15, which fp16 holds.
        token_scale = 2.0 ** -max(0, (128 * 8 * 2 * spec.k).bit_length() - 15)
        token = torch.full((1,), token_scale, dtype=torch.float16, device=scale.device)
        return words, scale, zero, half, torch.ldexp(1 / token.float(), exponent), token

    def packed_layout(self, spec: WeightSpec) -> PackedLayout | None:
        """None: all scales share an exponent."""
        return None

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        return super().unpack(packed[:3], spec)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        return aten.Quantizing.run(self, x, packed, bias, spec)

    def run_codes(self, x: CodedRows, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        if not len(x.codes):
            return x.codes.new_empty(0, spec.n, dtype=x.dtype)
        words, _, zero, half, factor, token = packed
        operator, offset = torch.ops._xpu_C.int4_gemm_w4a8, torch.zeros_like(token, dtype=torch.int32)
        y: Tensor = operator(
            x.codes, token, offset, words.t(), half, zero, spec.scheme.weight.group_size, None, None
        )
        y = y.float() * (x.scale * factor)
        return (y if bias is None else y + bias).to(x.dtype)


class _Fp8(Kernel):
    """e4m3fn weights with one scale, one for each output channel, or one for each 128x128.

    The operator recognizes blocks of 128x128 by scales of more than one row, so there must be at least two
    along K.
    """

    def serves(self, scheme: Scheme) -> bool:
        quant = scheme.weight
        return (
            quant.format == "e4m3fn"
            and quant.scale == "fp32"
            and quant.block_shape in ((0, 0), (1, 0), (128, 128))
        )

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        spec = request.weight
        reasons = list(vendor_reasons(request, self.name, f"_xpu_C.{self.name.partition('.')[2]}"))
        # A single block has one scale, as has a whole tensor.
        several = spec.scheme.weight.group_size and max(spec.n, spec.k) > 128
        if several and (spec.n % 128 or spec.k % 128 or spec.k < 256):
            needs = (
                f"{self.name} needs N and K to be multiples of 128, and two blocks along K, not "
                f"{spec.n} x {spec.k} [{_FP8}]"
            )
            # What it does with partial blocks along N only is not known.
            whole = spec.k % 128 == 0 and spec.k >= 256
            reasons.append(Reason(needs, Refusal.UNSAFE if whole else Refusal.IMPOSSIBLE))
        return reasons

    def claim(self, request: Request) -> Claim:
        """The vendor's source."""
        return Claim(Evidence.DECLARED, _FP8)

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        scale = stored_weight["weight_scale"]
        scale = scale.t().contiguous() if spec.scheme.weight.group_size else scale.view(-1)
        return stored_weight["weight"].view(torch.uint8), scale

    def packed_layout(self, spec: WeightSpec) -> PackedLayout | None:
        codes, scale = self.stored_layout(spec)
        if spec.scheme.weight.group_size:
            return PackedLayout((codes, PackedTensor(scale.shape[::-1], scale.dtype, rows=1)))
        return PackedLayout((codes, PackedTensor(scale.shape[:1], scale.dtype, scale.rows)))

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        weight, scale = packed
        scale = scale.t().contiguous() if spec.scheme.weight.group_size else scale.view(-1, 1)
        return {"weight": weight.view(torch.float8_e4m3fn), "weight_scale": scale}


class XpuFp8W8A16(_Fp8):
    """W8A16 through ``_xpu_C.fp8_gemm_w8a16``: e4m3fn per tensor, per output channel, or per 128x128."""

    name = "xpu.fp8_gemm_w8a16"
    tolerance = 2.0**-7

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        if not len(x):
            return x.new_empty(0, spec.n)
        weight, scale = packed
        y: Tensor = torch.ops._xpu_C.fp8_gemm_w8a16(x, weight.view(torch.float8_e4m3fn).t(), scale, bias)
        return y


class XpuFp8Gemm(_Fp8, aten.Quantizing):
    """W8A8 through ``_xpu_C.fp8_gemm``, where XMX multiplies e4m3fn: in both 16-bit types, and in blocks."""

    name = "xpu.fp8_gemm"
    tolerance = 2.0**-6

    def serves(self, scheme: Scheme) -> bool:
        return super().serves(scheme) and scheme.activation == Quant("e4m3fn", (1, scheme.weight.group_size))

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        # Elsewhere oneDNN converts both operands first.
        return [*aten.native_reason(request, "e4m3fn", Refusal.SLOWER), *super().reasons_against(request)]

    def claim(self, request: Request) -> Claim:
        """The vendor's source, and the instruction."""
        return Claim(Evidence.DECLARED, f"{_W8A8}; {request.device.arch.source}")

    def run_codes(self, x: CodedRows, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        if not len(x.codes):
            return x.codes.new_empty(0, spec.n, dtype=x.dtype)
        weight, row = packed
        columns = weight.view(x.codes.dtype).t()
        y: Tensor = torch.ops._xpu_C.fp8_gemm(x.codes, columns, x.dtype, x.scale, row, bias)
        return y
