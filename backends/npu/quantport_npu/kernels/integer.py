"""INT8 by INT8, and INT8 or INT4 weights with 16-bit activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from quantport.backend import Packed, Quant, Reason, Request, Scheme, StoredWeight, WeightSpec, numerics
from quantport_npu.kernels.base import Calls, NpuKernel, parts
from quantport_npu.vendor import FRACTAL_ND, LIMIT, NN, PLUGIN, to_fractal_nz

_CODES_AT_ONCE = 1 << 24  # int4 codes that are unpacked to int32 at a time


def operator_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias in the dtype that the operators take: fp32 for bf16 results, fp16 for fp16 results."""
    return bias if bias is None or dtype is torch.float16 else bias.float()


class NpuInt8(NpuKernel):
    """W8A8: a scale for each token and output channel, exact int32 sums, and both scales in the same launch.

    The weight is packed in FRACTAL_NZ.
    """

    name = "npu.quant_matmul"
    unit = "int8"
    calls: ClassVar[Calls] = {
        "npu_dynamic_quant": (),
        "npu_quant_matmul": ("pertoken_scale",),
        "npu_format_cast": (),
    }
    source = f"{PLUGIN}/torch_npu-npu_quant_matmul.md, torch_npu-npu_dynamic_quant.md"
    numeric_deviation = "the scale of a token is amax / 127, where the scheme has amax / 127.5"
    quantizes_activations = True

    def serves(self, scheme: Scheme) -> bool:
        token = Quant("int8", (1, 0))
        return scheme.activation == token == scheme.weight

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reasons, arch = list(super().reasons_against(request)), request.device.arch
        if arch.family == "310P":
            reasons.append(
                Reason(
                    f"{arch.name} has no npu_dynamic_quant, and no per-token scales in "
                    f"npu_quant_matmul [{self.source}]"
                )
            )
        return reasons

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        weight, scale = stored_weight["weight"], stored_weight["weight_scale"]
        return scale.view(-1), *(to_fractal_nz(weight[part].t().contiguous()) for part in parts(spec.n))

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        scale, *weights = packed
        rows = [torch.ops.npu.npu_format_cast(tile, FRACTAL_ND).t() for tile in weights]
        return {"weight": torch.cat(rows).contiguous(), "weight_scale": scale.view(-1, 1)}

    def activations(self, x: Tensor, spec: WeightSpec) -> Packed:
        q: Packed = torch.ops.npu.npu_dynamic_quant(x, dst_type=torch.int8)
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
        scale, *weights = packed
        tile = weights[parts(spec.n).index(part)]
        bias = None if bias is None else bias.float()
        y: Tensor = torch.ops.npu.npu_quant_matmul(
            q[0], tile, scale[part], pertoken_scale=q[1], bias=bias, output_dtype=dtype
        )
        return y


class _WeightOnly(NpuKernel):
    """16-bit activations: the operator converts the weights to 16 bits before the cube unit."""

    calls: ClassVar[Calls] = {"npu_weight_quant_batchmatmul": ()}
    source = f"{PLUGIN}/torch_npu-npu_weight_quant_batchmatmul.md"


class NpuWeightInt8(_WeightOnly):
    """INT8 with a scale for each output channel, in the stored layout: FRACTAL_NZ is for the graph mode only.

    The operator takes scales in the dtype of x.
    """

    name = "npu.weight_quant_int8"
    unit = "int8"
    numeric_deviation = "scales are rounded to the dtype of the activations"

    def serves(self, scheme: Scheme) -> bool:
        return scheme.weight == Quant("int8", (1, 0))

    def multiply(
        self,
        q: Packed,
        packed: Packed,
        part: slice,
        bias: Tensor | None,
        dtype: torch.dtype,
        spec: WeightSpec,
    ) -> Tensor:
        weight, scale = packed[0][part].t(), packed[1][part].view(-1).to(dtype)
        y: Tensor = torch.ops.npu.npu_weight_quant_batchmatmul(
            q[0], weight, scale, bias=operator_bias(bias, dtype)
        )
        return y


class NpuWeightFp8(_WeightOnly):
    """FP8 with a scale for each output channel, on Ascend 950; one scale of the whole weight is repeated.

    The operator takes scales and bias in the dtype of x.
    """

    name = "npu.weight_quant_fp8"
    unit = "e4m3fn"
    # The argument came with fp8.
    calls: ClassVar[Calls] = {"npu_weight_quant_batchmatmul": ("weight_dtype",)}
    source = f"{NN} matmul/weight_quant_batch_matmul_v2/docs/aclnnWeightQuantBatchMatmulV2.md"
    numeric_deviation = "scales are rounded to the dtype of the activations"

    def serves(self, scheme: Scheme) -> bool:
        return scheme.weight in (Quant("e4m3fn", (0, 0)), Quant("e4m3fn", (1, 0)))

    def multiply(
        self,
        q: Packed,
        packed: Packed,
        part: slice,
        bias: Tensor | None,
        dtype: torch.dtype,
        spec: WeightSpec,
    ) -> Tensor:
        weight, scale = packed[0][part].view(torch.float8_e4m3fn).t(), packed[1].to(dtype).view(-1)
        scale = scale[part] if spec.scheme.weight.block_shape[0] else scale.repeat(part.stop - part.start)
        y: Tensor = torch.ops.npu.npu_weight_quant_batchmatmul(q[0], weight, scale, bias=bias)
        return y


class NpuWeightInt4(_WeightOnly):
    """INT4 in groups.

    The order of the eight codes in a word is the operator's own and not documented; ``unpack`` gets the codes
    back as products with the identity.
    """

    name = "npu.weight_quant_int4"
    unit = "int4"
    calls: ClassVar[Calls] = {"npu_weight_quant_batchmatmul": (), "npu_convert_weight_to_int4pack": ()}
    source = (
        f"{PLUGIN}/torch_npu-npu_weight_quant_batchmatmul.md, torch_npu-npu_convert_weight_to_int4pack.md"
    )
    groups: ClassVar[str] = "groups of 32, 64... up to K - 1"

    def serves(self, scheme: Scheme) -> bool:
        quant = scheme.weight
        return quant == Quant("int4", (1, quant.group_size), "bf16", quant.rule) and quant.group_size > 0

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reasons, spec = list(super().reasons_against(request)), request.weight
        group = spec.scheme.weight.group_size
        if spec.n % 8:
            reasons.append(
                Reason(
                    f"{self.name} packs eight output channels to a word, and {spec.n} is no "
                    f"multiple of 8 [{self.source}]"
                )
            )
        if spec.n > LIMIT:
            reasons.append(Reason(f"{self.name} takes N up to {LIMIT}, not {spec.n} [{self.source}]"))
        if not self.divides(group, spec.k):
            reasons.append(
                Reason(f"{self.name} takes {self.groups}, not of {group} with K {spec.k} [{self.source}]")
            )
        return reasons

    def divides(self, group: int, k: int) -> bool:
        """Whether the operator takes groups of this size along K."""
        return not group % 32 and group < k

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        stored = stored_weight["weight_packed"]
        words = stored.new_empty(spec.k, spec.n // 8)
        step = max(8, _CODES_AT_ONCE // spec.n // 8 * 8)
        for i in range(0, spec.k, step):
            columns = stored[:, i // 8 : (i + step) // 8].contiguous()
            codes = numerics.unpack_int4(columns, min(step, spec.k - i)).t()
            codes = codes.to(torch.int32, memory_format=torch.contiguous_format)
            words[i : i + step] = torch.ops.npu.npu_convert_weight_to_int4pack(codes.contiguous())
        return words, *(
            stored_weight[key].t().contiguous()
            for key in ("weight_scale", "weight_zero")
            if key in stored_weight
        )

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        words, scale, *zero = packed
        ones = scale.new_ones(1, spec.n)
        step = max(8, _CODES_AT_ONCE // spec.k // 8 * 8)
        indices = torch.arange(spec.k, dtype=torch.int64, device=words.device)
        out = []
        for i in range(0, spec.k, step):
            # Products with rows of the identity are rows of codes, exact in bf16.
            identity = (indices == indices[i : i + step, None]).to(scale.dtype)
            codes = torch.ops.npu.npu_weight_quant_batchmatmul(identity, words, ones)
            out.append(numerics.pack_int4(codes.t().contiguous().to(torch.int8)))
        rest = dict(zip(("weight_scale", "weight_zero"), (scale, *zero), strict=False))
        return {"weight_packed": torch.cat(out, 1), **{key: t.t().contiguous() for key, t in rest.items()}}

    def multiply(
        self,
        q: Packed,
        packed: Packed,
        part: slice,
        bias: Tensor | None,
        dtype: torch.dtype,
        spec: WeightSpec,
    ) -> Tensor:
        words, scale, *zero = packed
        # The operator adds the offset to the codes, before it multiplies by the scale.
        offset = zero[0] / scale if zero else None
        y: Tensor = torch.ops.npu.npu_weight_quant_batchmatmul(
            q[0],
            words,
            scale.to(dtype),
            offset,
            bias=operator_bias(bias, dtype),
            antiquant_group_size=spec.scheme.weight.group_size,
        )
        return y


class NpuWeightInt4Offset(NpuWeightInt4):
    """INT4 in groups with offsets, for bf16 only: a group of equal values has an offset of 2**23 steps, which
    exceeds fp16.
    """

    name = "npu.weight_quant_int4_offset"
    numeric_deviation = "offsets are divided by their scales and rounded to the dtype of the activations"

    def serves(self, scheme: Scheme) -> bool:
        quant = scheme.weight
        return (
            quant == Quant("int4", (1, quant.group_size), "bf16", quant.rule, zero_point=True)
            and quant.group_size > 0
        )

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reasons = list(super().reasons_against(request))
        if request.dtype is torch.float16:
            reasons.append(Reason(f"{self.name} has offsets beyond the range of float16"))
        return reasons
