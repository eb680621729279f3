"""int8 through oneDNN's u8 x s8 matmul (VNNI). Activations go in as u8 with zero point 128: s8 is 500x slower there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantport.backend import Canonical, Packed, Request, Scheme, WeightSpec, aten
from quantport_cpu.kernels.base import TINY, CpuKernel

_DIGIT = 0x808080  # 128 in each of three base-256 digits
_FULL = 2.0**22 * 0.98  # largest magnitude of a row as a 23-bit integer; the margin keeps rounding inside three digits


def _matmul(q: Tensor, packed: Packed) -> Tensor:
    """u8 ``[M, K]`` with zero point 128, times the weight and its channel scales: fp32 ``[M, N]``."""
    weight, scale, zeros = packed
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        q, 1.0, 128, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )  # fmt: skip
    return out


class _OneDnnInt8(CpuKernel):
    """The packing that both kernels share: a weight that was packed once serves both."""

    def reasons_against(self, request: Request) -> Sequence[str]:
        reasons = list(aten.native_reason(request, "int8"))
        if not hasattr(torch.ops.onednn, "qlinear_prepack") or not torch.backends.mkldnn.is_available():
            reasons.append("this torch has no onednn.qlinear_prepack")
        if request.device.arch.name.startswith("arm"):
            reasons.append("oneDNN's u8 x s8 matmul is measured on x86 only")
        return reasons

    def pack(self, canonical: Canonical, spec: WeightSpec) -> Packed:
        weight = torch.ops.onednn.qlinear_prepack(canonical["weight"], None)
        scale = canonical["weight_scale"].reshape(-1)
        return weight, scale, torch.zeros(spec.n, dtype=torch.int32)

    def unpack(self, packed: Packed, spec: WeightSpec) -> Canonical:
        return {"weight": packed[0].to_dense().t().contiguous(), "weight_scale": packed[1].view(-1, 1)}


class CpuInt8(_OneDnnInt8):
    """W8A8: per-token dynamic activations, exact int32 sums, scales in fp32."""

    name = "cpu.int8"
    tolerance = 2.0**-7
    quantizes_activations = True

    def serves(self, scheme: Scheme) -> bool:
        return scheme.weight.format == "int8" and scheme.activation is not None

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        values = x.float()
        scale = values.abs().amax(-1, keepdim=True).div_(127.5).clamp_min_(TINY)
        q = (values / scale).round_().clamp_max_(127).add_(128).to(torch.uint8)
        y = _matmul(q, packed).mul_(scale)
        return (y if bias is None else y.add_(bias)).to(x.dtype)


class CpuInt8WeightOnly(_OneDnnInt8):
    """W8A16, exactly, on the u8 x s8 matmul: each row becomes 23-bit integers, three base-256 digits, three rows of u8.

    Adding 0x808080 to a value below 2**22 lands in [2**23, 2**24), where fp32 holds integers only, so the addition
    itself rounds to nearest; its low three bytes are the digits, each with zero point 128.
    """

    name = "cpu.int8_weight_only"
    tolerance = 2.0**-7

    def serves(self, scheme: Scheme) -> bool:
        return scheme.weight.format == "int8"

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        m, k = x.shape
        values = x.float()
        scale = values.abs().amax(-1, keepdim=True).div_(_FULL).clamp_min_(TINY)
        digits = (values / scale).add_(_DIGIT).to(torch.int32).view(torch.uint8).view(m, k, 4)
        y = _matmul(digits.permute(2, 0, 1)[:3].reshape(3 * m, k), packed)
        y = y[2 * m :].mul_(256).add_(y[m : 2 * m]).mul_(256).add_(y[:m]).mul_(scale)
        return (y if bias is None else y.add_(bias)).to(x.dtype)
