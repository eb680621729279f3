"""Microscaling formats of Ascend950: a power-of-two scale for each 32 elements along K, and a second level in
dual scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantport.backend import Packed, Quant, Reason, Request, Scheme, StoredWeight, WeightSpec
from quantport_npu.kernels.base import Calls, NpuKernel, even, uneven
from quantport_npu.vendor import E2M1, E8M0, FRACTAL_ND, LIMIT, NN, tiles

_E4M3 = torch.float8_e4m3fn


def _one_level(quant: Quant | None, element: str) -> bool:
    return quant is not None and (
        quant.format,
        quant.block_shape[0],
        quant.group_size,
        quant.scale,
        quant.outer_block,
    ) == (element, 1, 32, "e8m0", None)


@dataclass(frozen=True)
class Way:
    """How one scheme runs: its elements, and the operator's rule for the scales of activations.

    Attributes:
        weight: Element format of the weight.
        activation: Element format of the activations.
        rules: Rules of schemes whose scales the operator computes to the bit.
        options: Arguments of ``npu_dynamic_mx_quant``.
        sizes: ``group_sizes`` of the product.
        unit: Format that the cube unit must multiply.
    """

    weight: str
    activation: str
    rules: tuple[str, ...]
    options: dict[str, Any]
    sizes: tuple[int, int, int]
    unit: str


_FP8 = {"dst_type": _E4M3}
_FP4 = {"dst_type": E2M1, "scale_alg": 2, "dst_type_max": 7.0}
WAYS = {
    "npu.quant_matmul_mxfp8": Way("e4m3fn", "e4m3fn", (), {**_FP8, "scale_alg": 0}, (1, 1, 32), "mxfp8"),
    "npu.quant_matmul_mxfp8_floor": Way(
        "e4m3fn", "e4m3fn", ("floor",), {**_FP8, "scale_alg": 0}, (1, 1, 32), "mxfp8"
    ),
    "npu.quant_matmul_mxfp8_rceil": Way(
        "e4m3fn", "e4m3fn", ("rceil",), {**_FP8, "scale_alg": 1}, (1, 1, 32), "mxfp8"
    ),
    "npu.quant_matmul_mxfp4": Way("e2m1", "e2m1", ("even",), _FP4, (1, 1, 32), "mxfp4"),
    "npu.quant_matmul_mxfp4_floor": Way(
        "e2m1", "e2m1", ("floor",), {"dst_type": E2M1, "scale_alg": 0}, (1, 1, 32), "mxfp4"
    ),
    "npu.quant_matmul_mxfp4_w4a8": Way("e2m1", "e4m3fn", (), {**_FP8, "scale_alg": 0}, (0, 0, 32), "mxfp8"),
}
_EXACT = {(w.weight, w.activation, rule) for w in WAYS.values() for rule in w.rules}


class NpuMx(NpuKernel):
    """MXFP8, MXFP4, and MXFP4 weights with MXFP8 activations. Weights have the scales of the scheme, whatever
    its rule.
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
        self.name, self.way = name, WAYS[name]
        self.unit = self.way.unit
        if not self.way.rules:
            self.numeric_deviation = (
                "scales of activations are those of the OCP rule (floor), whatever the scheme's"
            )

    def serves(self, scheme: Scheme) -> bool:
        way, activation = self.way, scheme.activation
        if activation is None or not (
            _one_level(scheme.weight, way.weight) and _one_level(activation, way.activation)
        ):
            return False
        exact = (way.weight, way.activation, activation.rule)
        return activation.rule in way.rules if way.rules else exact not in _EXACT

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reasons, spec = list(super().reasons_against(request)), request.weight
        if self.way.activation == "e2m1" and (spec.k % 2 or spec.k == 2):
            reasons.append(
                Reason(
                    f"{self.name} takes even K from 4 on, two elements to a byte, not {spec.k} "
                    f"[{self.source}]"
                )
            )
        if self.way.activation != self.way.weight and spec.k % 8:
            reasons.append(Reason(f"{self.name} takes K in multiples of 8, not {spec.k} [{self.source}]"))
        return reasons

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        weight, scale = super().pack(stored_weight, spec)
        return weight, even(scale)

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        return super().unpack((packed[0], uneven(packed[1], -(-spec.k // 32))), spec)

    def activations(self, x: Tensor, spec: WeightSpec) -> Packed:
        q: Packed = torch.ops.npu.npu_dynamic_mx_quant(x, **self.way.options)
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
        way = self.way
        weight, scale = packed[0][part], packed[1][part].transpose(0, 1)
        four = {"x2_dtype": E2M1} if way.weight == "e2m1" else {}
        four |= {"x1_dtype": E2M1} if way.activation == "e2m1" else {}
        y: Tensor = torch.ops.npu.npu_quant_matmul(
            q[0],
            (weight if four else weight.view(_E4M3)).t(),
            scale,
            scale_dtype=E8M0,
            pertoken_scale=q[1],
            pertoken_scale_dtype=E8M0,
            output_dtype=dtype,
            group_sizes=list(way.sizes),
            **four,
        )
        return y if bias is None else y + bias


class NpuDualScale(NpuKernel):
    """MXFP4 with a second, fp32 scale per 512. The weight lies in tiles, its outer scales along the output
    channels.
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
        weight = tiles(stored_weight["weight_packed"].view(torch.int8), customize_dtype=torch.int8)
        return (
            weight,
            even(stored_weight["weight_scale"]),
            stored_weight["weight_outer_scale"].t().contiguous(),
        )

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        weight, scale, outer = packed
        return {
            "weight_packed": torch.ops.npu.npu_format_cast(
                weight, FRACTAL_ND, customize_dtype=torch.int8
            ).view(torch.uint8),
            "weight_scale": uneven(scale, -(-spec.k // 32)),
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
