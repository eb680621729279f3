"""Experts: all groups of rows by weights of their own in one launch, the weights of all experts in one
tensor.

On the 950, gate, up, SwiGLU and the quantization of what comes out are one launch too. On the other chips
that operator takes INT8 in FRACTAL_NZ only, which no view of a stack is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantport.backend import GroupedKernel, Kernel, Packed, Reason, Request, StoredWeight, WeightSpec
from quantport_npu.kernels.base import Calls, NpuKernel
from quantport_npu.kernels.floating import NpuFp8
from quantport_npu.kernels.integer import NpuInt8, NpuWeightInt4, NpuWeightInt8
from quantport_npu.kernels.mx import WAYS, NpuMx
from quantport_npu.vendor import E2M1, E8M0, LIMIT, PLUGIN, family, lacking

_PAGE = f"{PLUGIN}/torch_npu-npu_grouped_matmul.md"
_ON_950 = "vllm-project/vllm-ascend at 182b75ea, vllm_ascend/device/device_op.py, as A5DeviceAdaptor calls it"
_FUSED = "with SiLU on Ascend 950, the product of gate and up is quantized without a rounding to 16 bits"
_GATED = "npu_grouped_matmul_swiglu_quant_v2"


class NpuGrouped(GroupedKernel, NpuKernel):
    """``npu_grouped_matmul``: one tensor of activations, one of weights ``[groups, K, N]``, one result.

    Attributes:
        families: SoCs for which the vendor documents or tests it.
    """

    families: ClassVar[tuple[str, ...]]
    layers = ("moe",)

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        reasons, arch = list(super().reasons_against(request)), request.device.arch
        if not reasons and arch.family not in self.families:
            reasons.append(
                Reason(
                    f"{self.name} is documented for {', '.join(self.families)}, not {arch.name} "
                    f"[{self.source}]"
                )
            )
        if 2 * request.weight.n > LIMIT:
            reasons.append(
                Reason(
                    f"{self.name} takes up to {LIMIT} columns of gate and up, not 2 x "
                    f"{request.weight.n} [{self.source}]"
                )
            )
        return reasons

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        """One group."""
        offsets = torch.tensor([0, len(x)], dtype=torch.int32, device=x.device)
        return self.run_grouped(
            x, offsets, self.prepare_grouped([packed]), None if bias is None else bias[None], spec
        )

    def run_grouped(
        self,
        x: Tensor,
        offsets: Tensor,
        stack: Packed,
        bias: Tensor | None,
        spec: WeightSpec,
        shared: int = 1,
    ) -> Tensor:
        if not len(x):
            return x.new_empty(0, shared * spec.n)
        y = self.grouped(self.activations(x, spec), stack, offsets[1:].long(), x.dtype)
        if bias is None:
            return y
        return y + bias.repeat_interleave(offsets.diff(), 0, output_size=len(x))

    @abstractmethod
    def grouped(self, q: Packed, stack: Packed, ends: Tensor, dtype: torch.dtype) -> Tensor:
        """Quantized activations by a stack; ``ends`` int64 ``[groups]`` are where the rows of each
        group end.
        """

    def launch(self, q: Packed, weight: Tensor, ends: Tensor, dtype: torch.dtype, **scales: Any) -> Tensor:
        """The operator, for rows in groups."""
        y: list[Tensor] = torch.ops.npu.npu_grouped_matmul(
            [q[0]],
            [weight],
            group_list=ends,
            split_item=3,
            group_type=0,
            group_list_type=0,
            output_dtype=dtype,
            **scales,
        )
        return y[0]


class _Gated(NpuGrouped):
    """A kernel whose activations the fused operator can quantize again after SwiGLU."""

    def run_gated(
        self,
        x: Tensor,
        offsets: Tensor,
        gate_up: Packed,
        down: Packed,
        specs: tuple[WeightSpec, WeightSpec],
        activation: str,
    ) -> Tensor | None:
        if (
            activation != "silu"
            or family() != "A5"
            or lacking(_GATED, ("weight_scale_dtype",))
            or not self.gates(specs[0])
        ):
            return None
        ends = offsets[1:].long()
        hidden = self.gated(self.activations(x, specs[0]), gate_up, ends)
        return self.grouped(hidden, down, ends, x.dtype)

    def gates(self, spec: WeightSpec) -> bool:
        """Whether the fused operator takes gate and up of this shape, and quantizes as the scheme does."""
        return True

    @abstractmethod
    def gated(self, q: Packed, stack: Packed, ends: Tensor) -> Packed:
        """Activations of down, quantized: ``silu(gate) * up`` of every row."""


class _PerToken(_Gated):
    """8-bit weights with a scale for each output channel, in the stored layout."""

    calls: ClassVar[Calls] = {
        "npu_dynamic_quant": (),
        "npu_grouped_matmul": ("per_token_scale", "output_dtype"),
    }
    element: ClassVar[torch.dtype]

    def sides(self, stack: Packed) -> Packed:
        """Weights ``[groups, K, shared * N]``, a transposed view, and scales ``[groups, shared * N]``."""
        weight, scale = stack
        return weight.flatten(1, 2).view(self.element).transpose(1, 2), scale.flatten(1)

    def grouped(self, q: Packed, stack: Packed, ends: Tensor, dtype: torch.dtype) -> Tensor:
        weight, scale = self.sides(stack)
        return self.launch(
            q, weight, ends, dtype, scale=[self.scale_for(dtype, scale)], per_token_scale=[q[1]]
        )

    def scale_for(self, dtype: torch.dtype, scale: Tensor) -> Tensor:
        """Scales as the operator takes them for results of ``dtype``."""
        return scale

    def gated(self, q: Packed, stack: Packed, ends: Tensor) -> Packed:
        weight, scale = self.sides(stack)
        out: Packed = torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2(
            q[0], [weight], [scale], q[1], ends, dequant_dtype=torch.float32, quant_dtype=self.element
        )
        return out


class NpuGroupedInt8(_PerToken, NpuInt8):
    """W8A8. The operator takes scales of output channels in bf16 where the result is bf16."""

    name = "npu.grouped_matmul"
    families = ("A2", "A3", "A5")
    source = f"{_PAGE}; {_ON_950}"
    numeric_deviation = (
        f"{NpuInt8.numeric_deviation}; scales of output channels are rounded to bfloat16 where the "
        f"result is bfloat16; {_FUSED}"
    )
    element = torch.int8
    pack, unpack = Kernel.pack, Kernel.unpack

    def scale_for(self, dtype: torch.dtype, scale: Tensor) -> Tensor:
        return scale.to(dtype) if dtype is torch.bfloat16 else scale


class NpuGroupedFp8(_PerToken, NpuFp8):
    """FP8 by FP8, a scale for each token and each output channel."""

    name = "npu.grouped_matmul_fp8"
    numeric_deviation = _FUSED
    families = ("A5",)
    calls: ClassVar[Calls] = {
        "npu_dynamic_quant": ("dst_type",),
        "npu_grouped_matmul": ("per_token_scale", "x_dtype"),
    }
    source = _ON_950
    element = torch.float8_e4m3fn

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        return stored_weight["weight"].view(torch.uint8), stored_weight["weight_scale"].expand(
            spec.n, 1
        ).contiguous()

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        rows = spec.scheme.weight.scale_shape(spec.n, spec.k)[0]
        return {"weight": packed[0].view(self.element), "weight_scale": packed[1][:rows].contiguous()}


class NpuGroupedMx(_Gated, NpuMx):
    """MXFP8 and MXFP4."""

    families = ("A5",)
    calls: ClassVar[Calls] = {
        "npu_dynamic_mx_quant": ("scale_alg", "dst_type_max"),
        "npu_grouped_matmul": ("x_dtype", "weight_dtype", "scale_dtype", "per_token_scale_dtype"),
    }
    source = _ON_950

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name.replace("quant_matmul", "grouped_matmul")
        if self.fuses:
            self.numeric_deviation = "; ".join(filter(None, (self.numeric_deviation, _FUSED)))

    def grouped(self, q: Packed, stack: Packed, ends: Tensor, dtype: torch.dtype) -> Tensor:
        weight, scale = self.sides(stack)
        four = {"x_dtype": E2M1, "weight_dtype": E2M1} if self.way.weight == "e2m1" else {}
        return self.launch(
            q,
            weight,
            ends,
            dtype,
            scale=[scale],
            per_token_scale=[q[1]],
            scale_dtype=E8M0,
            per_token_scale_dtype=E8M0,
            **four,
        )

    def gates(self, spec: WeightSpec) -> bool:
        """It takes whole blocks of 128 of gate and up."""
        return self.fuses and not 2 * spec.n % 128

    @property
    def fuses(self) -> bool:
        """MXFP8 with the rule of OCP: builds differ about the shape of MXFP4 results, and there is no other
        rule.

        The page writes the exponent of results with the brackets of rounding; it is read as that of
        npu_dynamic_mx_quant, a floor.
        """
        return self.way.weight == "e4m3fn" and self.way.options["scale_alg"] == 0

    def gated(self, q: Packed, stack: Packed, ends: Tensor) -> Packed:
        weight, scale = self.sides(stack)
        out: Packed = torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2(
            q[0],
            [weight],
            [scale],
            q[1],
            ends,
            dequant_mode=2,
            dequant_dtype=torch.float32,
            quant_mode=2,
            quant_dtype=torch.float8_e4m3fn,
            weight_scale_dtype=E8M0,
            x_scale_dtype=E8M0,
        )
        return out

    def sides(self, stack: Packed) -> Packed:
        """Transposed views: weights ``[groups, K, shared * N]`` and scales ``[groups, K / 64, shared * N,
        2]``.
        """
        weight, scale = (t.flatten(1, 2) for t in stack)
        weight = weight if self.way.weight == "e2m1" else weight.view(torch.float8_e4m3fn)
        return weight.transpose(1, 2), scale.transpose(1, 2)


class NpuGroupedWeightInt8(NpuGrouped, NpuWeightInt8):
    """INT8 by channel with 16-bit activations."""

    name = "npu.grouped_weight_int8"
    families = ("A2", "A3")
    calls: ClassVar[Calls] = {"npu_grouped_matmul": ("antiquant_scale", "antiquant_offset", "output_dtype")}
    source = _PAGE

    def grouped(self, q: Packed, stack: Packed, ends: Tensor, dtype: torch.dtype) -> Tensor:
        scale = stack[1].flatten(1).to(dtype)
        weight = stack[0].flatten(1, 2).transpose(1, 2)
        return self.launch(
            q, weight, ends, dtype, antiquant_scale=[scale], antiquant_offset=[torch.zeros_like(scale)]
        )


class NpuGroupedWeightInt4(NpuGrouped, NpuWeightInt4):
    """INT4 in groups with 16-bit activations. Words and scales of gate and up alternate along N, in one
    matrix for each expert.
    """

    name = "npu.grouped_weight_int4"
    families = ("A2", "A3")
    calls: ClassVar[Calls] = {
        **NpuWeightInt4.calls,
        "npu_grouped_matmul": ("antiquant_scale", "antiquant_offset", "output_dtype"),
    }
    source = _PAGE

    groups = "one group or several equal ones along K"

    def divides(self, group: int, k: int) -> bool:
        return group >= k or not k % group

    def allocate(self, packed: Packed, groups: int, shared: int) -> Packed:
        """``[groups, K, shared, N / 8]`` and ``[groups, K / group, shared, N]``."""
        return tuple(t.new_empty(groups, t.shape[0], shared, t.shape[1]) for t in packed)

    def expert_view(self, stack: Packed, group: int, which: int) -> Packed:
        return tuple(t[group, :, which] for t in stack)

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        # the operator that gives codes back takes no strided views
        return super().unpack(tuple(t.contiguous() for t in packed), spec)

    def grouped(self, q: Packed, stack: Packed, ends: Tensor, dtype: torch.dtype) -> Tensor:
        words, scale = stack[0].flatten(2), stack[1].flatten(2).to(dtype)
        return self.launch(
            q, words, ends, dtype, antiquant_scale=[scale], antiquant_offset=[torch.zeros_like(scale)]
        )


def kernels() -> tuple[NpuGrouped, ...]:
    """Every grouped kernel."""
    mx = (NpuGroupedMx(name) for name in WAYS if not name.endswith("w4a8"))
    return NpuGroupedInt8(), NpuGroupedFp8(), *mx, NpuGroupedWeightInt8(), NpuGroupedWeightInt4()
