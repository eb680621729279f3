"""Experts: one launch multiplies each group of rows by the weight of its expert. The weights of all experts
are one tensor.

On the 950, gate, up, SwiGLU and the quantization of the result are one launch too. On the other chips that
operator takes INT8 in FRACTAL_NZ only, which a view of a stack cannot be.
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
from quantport_npu.kernels.mx import VARIANTS, NpuMx
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
        """All rows as one group."""
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
        """Multiplies quantized activations by a stack; ``ends``, int64 ``[groups]``, are the ends of the
        groups of rows.
        """

    def launch(self, q: Packed, weight: Tensor, ends: Tensor, dtype: torch.dtype, **scales: Any) -> Tensor:
        """Calls ``npu_grouped_matmul`` for rows in groups."""
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
    """A kernel with a fused operator for gate, up, SwiGLU and the quantization of the result."""

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
            or not self.fits_fused(specs[0])
        ):
            return None
        ends = offsets[1:].long()
        hidden = self.fused_gate_up(self.activations(x, specs[0]), gate_up, ends)
        return self.grouped(hidden, down, ends, x.dtype)

    def fits_fused(self, spec: WeightSpec) -> bool:
        """Whether the fused operator takes gate and up of this shape and quantizes as the scheme does."""
        return True

    @abstractmethod
    def fused_gate_up(self, q: Packed, stack: Packed, ends: Tensor) -> Packed:
        """Quantized ``silu(gate) * up`` of every row, the activations of down."""


class _PerToken(_Gated):
    """8-bit weights with a scale for each output channel, in the stored layout."""

    calls: ClassVar[Calls] = {
        "npu_dynamic_quant": (),
        "npu_grouped_matmul": ("per_token_scale", "output_dtype"),
    }
    element: ClassVar[torch.dtype]

    def operands(self, stack: Packed) -> Packed:
        """Weights ``[groups, K, shared * N]``, a transposed view, and scales ``[groups, shared * N]``."""
        weight, scale = stack
        return weight.flatten(1, 2).view(self.element).transpose(1, 2), scale.flatten(1)

    def grouped(self, q: Packed, stack: Packed, ends: Tensor, dtype: torch.dtype) -> Tensor:
        weight, scale = self.operands(stack)
        return self.launch(
            q, weight, ends, dtype, scale=[self.scale_for(dtype, scale)], per_token_scale=[q[1]]
        )

    def scale_for(self, dtype: torch.dtype, scale: Tensor) -> Tensor:
        """The scales in the dtype that the operator takes for results of ``dtype``."""
        return scale

    def fused_gate_up(self, q: Packed, stack: Packed, ends: Tensor) -> Packed:
        weight, scale = self.operands(stack)
        out: Packed = torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2(
            q[0], [weight], [scale], q[1], ends, dequant_dtype=torch.float32, quant_dtype=self.element
        )
        return out


class NpuGroupedInt8(_PerToken, NpuInt8):
    """W8A8. Where the result is bf16, the operator takes the scales of output channels in bf16."""

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
    """FP8 by FP8 with a scale for each token and each output channel."""

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
        scale = stored_weight["weight_scale"].expand(spec.n, 1)
        return stored_weight["weight"].view(torch.uint8), scale.contiguous()

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
        if self.fusable:
            self.numeric_deviation = "; ".join(filter(None, (self.numeric_deviation, _FUSED)))

    def grouped(self, q: Packed, stack: Packed, ends: Tensor, dtype: torch.dtype) -> Tensor:
        weight, scale = self.operands(stack)
        fp4_dtypes = {"x_dtype": E2M1, "weight_dtype": E2M1} if self.variant.weight == "e2m1" else {}
        return self.launch(
            q,
            weight,
            ends,
            dtype,
            scale=[scale],
            per_token_scale=[q[1]],
            scale_dtype=E8M0,
            per_token_scale_dtype=E8M0,
            **fp4_dtypes,
        )

    def fits_fused(self, spec: WeightSpec) -> bool:
        """The fused operator takes gate and up in whole blocks of 128 columns."""
        return self.fusable and not 2 * spec.n % 128

    @property
    def fusable(self) -> bool:
        """Whether the fused operator quantizes so: only MXFP8 with the OCP rule, since it has no other rule
        and builds differ in the shape of MXFP4 results.

        Its page writes the exponent of the result with rounding brackets; it is taken for a floor, as in
        npu_dynamic_mx_quant.
        """
        return self.variant.weight == "e4m3fn" and self.variant.quantize_options["scale_alg"] == 0

    def fused_gate_up(self, q: Packed, stack: Packed, ends: Tensor) -> Packed:
        weight, scale = self.operands(stack)
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

    def operands(self, stack: Packed) -> Packed:
        """Views: weights ``[groups, K, shared * N]``, scales ``[groups, K / 64, shared * N, 2]``."""
        weight, scale = (t.flatten(1, 2) for t in stack)
        weight = weight if self.variant.weight == "e2m1" else weight.view(torch.float8_e4m3fn)
        return weight.transpose(1, 2), scale.transpose(1, 2)


class NpuGroupedWeightInt8(NpuGrouped, NpuWeightInt8):
    """INT8 with a scale for each output channel, and 16-bit activations."""

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
    """INT4 in groups with 16-bit activations.

    An expert has one matrix, in whose rows the words, or scales, of gate are followed by those of up.
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
        # The operator of the base class takes no strided views.
        return super().unpack(tuple(t.contiguous() for t in packed), spec)

    def grouped(self, q: Packed, stack: Packed, ends: Tensor, dtype: torch.dtype) -> Tensor:
        words, scale = stack[0].flatten(2), stack[1].flatten(2).to(dtype)
        return self.launch(
            q, words, ends, dtype, antiquant_scale=[scale], antiquant_offset=[torch.zeros_like(scale)]
        )


def kernels() -> tuple[NpuGrouped, ...]:
    """Every grouped kernel."""
    mx = (NpuGroupedMx(name) for name in VARIANTS if not name.endswith("w4a8"))
    return NpuGroupedInt8(), NpuGroupedFp8(), *mx, NpuGroupedWeightInt8(), NpuGroupedWeightInt4()
