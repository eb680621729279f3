"""Microscaling formats on Ascend 950: a power-of-two scale for each 32 elements along K, and in dual scale a
second level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantport.backend import Packed, Quant, Reason, Request, Scheme, StoredWeight, WeightSpec
from quantport_npu.kernels.base import Calls, NpuKernel, from_pairs, to_pairs
from quantport_npu.vendor import E2M1, E8M0, FRACTAL_ND, LIMIT, NN, to_fractal_nz

_E4M3 = torch.float8_e4m3fn


def _one_level(quant: Quant | None, element: str) -> bool:
    if quant is None:
        return False
    levels = (quant.format, quant.block_shape[0], quant.group_size, quant.scale, quant.outer_block)
    return levels == (element, 1, 32, "e8m0", None)


@dataclass(frozen=True)
class MxVariant:
    """A pair of element formats, and one of the operator's rules for the scales of activations.

    Attributes:
        weight: Element format of the weight.
        activation: Element format of the activations.
        rules: Rules of schemes whose scales the operator computes bit for bit; empty where it serves the
            schemes with all other rules.
        quantize_options: Arguments of ``npu_dynamic_mx_quant``.
        group_sizes: Argument of ``npu_quant_matmul``.
        unit: Format that the cube unit must multiply.
    """

    weight: str
    activation: str
    rules: tuple[str, ...]
    quantize_options: dict[str, Any]
    group_sizes: tuple[int, int, int]
    unit: str


_FP8 = {"dst_type": _E4M3}
_FP4 = {"dst_type": E2M1, "scale_alg": 2, "dst_type_max": 7.0}
VARIANTS = {
    "npu.quant_matmul_mxfp8": MxVariant(
        "e4m3fn", "e4m3fn", (), {**_FP8, "scale_alg": 0}, (1, 1, 32), "mxfp8"
    ),
    "npu.quant_matmul_mxfp8_floor": MxVariant(
        "e4m3fn", "e4m3fn", ("floor",), {**_FP8, "scale_alg": 0}, (1, 1, 32), "mxfp8"
    ),
    "npu.quant_matmul_mxfp8_rceil": MxVariant(
        "e4m3fn", "e4m3fn", ("rceil",), {**_FP8, "scale_alg": 1}, (1, 1, 32), "mxfp8"
    ),
    "npu.quant_matmul_mxfp4": MxVariant("e2m1", "e2m1", ("even",), _FP4, (1, 1, 32), "mxfp4"),
    "npu.quant_matmul_mxfp4_floor": MxVariant(
        "e2m1", "e2m1", ("floor",), {"dst_type": E2M1, "scale_alg": 0}, (1, 1, 32), "mxfp4"
    ),
    "npu.quant_matmul_mxfp4_w4a8": MxVariant(
        "e2m1", "e4m3fn", (), {**_FP8, "scale_alg": 0}, (0, 0, 32), "mxfp8"
    ),
}
_EXACT = {(v.weight, v.activation, rule) for v in VARIANTS.values() for rule in v.rules}


class NpuMx(NpuKernel):
    """MXFP8, MXFP4, and MXFP4 weights with MXFP8 activations.

    Weights have the scales of the scheme, whatever its rule; those of activations follow the operator's rule.
    """

    calls: ClassVar[Calls] = {
        "npu_dynamic_mx_quant": ("scale_alg", "dst_type_max"),
        "npu_quant_matmul": ("group_sizes", "scale_dtype", "x2_dtype"),
    }
    source = (
        f"{NN} quant/dynamic_mx_quant/docs/aclnnDynamicMxQuantV2.md, "
        "matmul/quant_batch_matmul_v4/docs/aclnnQuantMatmulV5.md"
    )
    quantizes_activations = True

    def __init__(self, name: str) -> None:
        self.name, self.variant = name, VARIANTS[name]
        self.unit = self.variant.unit
        if not self.variant.rules:
            self.numeric_deviation = (
                "scales of activations are those of the OCP rule (floor), whatever the scheme's"
            )

    def serves(self, scheme: Scheme) -> bool:
        variant, activation = self.variant, scheme.activation
        if activation is None or not (
            _one_level(scheme.weight, variant.weight) and _one_level(activation, variant.activation)
        ):
            return False
        if variant.rules:
            return activation.rule in variant.rules
        return (variant.weight, variant.activation, activation.rule) not in _EXACT

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reasons, spec = list(super().reasons_against(request)), request.weight
        if self.variant.activation == "e2m1" and (spec.k % 2 or spec.k == 2):
            reasons.append(
                Reason(
                    f"{self.name} takes even K from 4 on, two elements to a byte, not {spec.k} "
                    f"[{self.source}]"
                )
            )
        if self.variant.activation != self.variant.weight and spec.k % 8:
            reasons.append(Reason(f"{self.name} takes K in multiples of 8, not {spec.k} [{self.source}]"))
        return reasons

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        weight, scale = super().pack(stored_weight, spec)
        return weight, to_pairs(scale)

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        return super().unpack((packed[0], from_pairs(packed[1], -(-spec.k // 32))), spec)

    def activations(self, x: Tensor, spec: WeightSpec) -> Packed:
        q: Packed = torch.ops.npu.npu_dynamic_mx_quant(x, **self.variant.quantize_options)
        return q

    def multiply(
        self,
        q: Packed,
        packed: Packed,
        part: slice,
        bias: Tensor | None,
        dtype: torch.dtype,
        spec: WeightSpec,
    ) -> Tensor:
        variant = self.variant
        weight, scale = packed[0][part], packed[1][part].transpose(0, 1)
        fp4_dtypes = {"x2_dtype": E2M1} if variant.weight == "e2m1" else {}
        fp4_dtypes |= {"x1_dtype": E2M1} if variant.activation == "e2m1" else {}
        y: Tensor = torch.ops.npu.npu_quant_matmul(
            q[0],
            (weight if fp4_dtypes else weight.view(_E4M3)).t(),
            scale,
            scale_dtype=E8M0,
            pertoken_scale=q[1],
            pertoken_scale_dtype=E8M0,
            output_dtype=dtype,
            group_sizes=list(variant.group_sizes),
            **fp4_dtypes,
        )
        return y if bias is None else y + bias


class NpuDualScale(NpuKernel):
    """MXFP4 with a second scale per 512 elements, in fp32.

    The weight is packed in FRACTAL_NZ, its outer scales as ``[ceil(k / 512), n]``.
    """

    name = "npu.dual_level_quant_matmul"
    unit = "mxfp4"
    calls: ClassVar[Calls] = {
        "npu_dynamic_dual_level_mx_quant": (),
        "npu_dual_level_quant_matmul": (),
        "npu_format_cast": ("customize_dtype",),
    }
    source = (
        f"{NN} quant/dynamic_dual_level_mx_quant/docs/aclnnDynamicDualLevelMxQuant.md, "
        "matmul/dual_level_quant_batch_matmul/docs/aclnnDualLevelQuantMatmulWeightNz.md"
    )
    quantizes_activations = True

    def serves(self, scheme: Scheme) -> bool:
        dual = Quant("e2m1", (1, 32), "e8m0", "floor", outer_block=(1, 512))
        return (
            scheme.activation
            == dual
            == Quant("e2m1", (1, 32), "e8m0", "floor", outer_block=scheme.weight.outer_block)
        )

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reasons, spec = list(super().reasons_against(request)), request.weight
        if spec.k % 2:
            reasons.append(
                Reason(
                    f"{self.name} packs two elements to a byte along K, and {spec.k} is odd [{self.source}]"
                )
            )
        if spec.n > LIMIT:
            reasons.append(Reason(f"{self.name} takes N up to {LIMIT}, not {spec.n} [{self.source}]"))
        return reasons

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        weight = to_fractal_nz(stored_weight["weight_packed"].view(torch.int8), customize_dtype=torch.int8)
        return (
            weight,
            to_pairs(stored_weight["weight_scale"]),
            stored_weight["weight_outer_scale"].t().contiguous(),
        )

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        weight, scale, outer = packed
        return {
            "weight_packed": torch.ops.npu.npu_format_cast(
                weight, FRACTAL_ND, customize_dtype=torch.int8
            ).view(torch.uint8),
            "weight_scale": from_pairs(scale, -(-spec.k // 32)),
            "weight_outer_scale": outer.t().contiguous(),
        }

    def activations(self, x: Tensor, spec: WeightSpec) -> Packed:
        q: Packed = torch.ops.npu.npu_dynamic_dual_level_mx_quant(x)
        return q

    def multiply(
        self,
        q: Packed,
        packed: Packed,
        part: slice,
        bias: Tensor | None,
        dtype: torch.dtype,
        spec: WeightSpec,
    ) -> Tensor:
        codes, level0, level1 = q
        weight, scale, outer = packed
        bias = None if bias is None else bias.float()
        y: Tensor = torch.ops.npu.npu_dual_level_quant_matmul(
            codes, weight, level0, outer, level1, scale, bias=bias, output_dtype=dtype
        )
        return y
