"""Kernels made of ATen operators alone: any room may offer them for its device. They run wherever torch runs.

The operators and their limits: PyTorch ``native_functions.yaml`` and ``torch/_meta_registrations.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantport import numerics
from quantport.kernels.base import (
    CodedRows,
    Kernel,
    Packed,
    PackedLayout,
    PackedTensor,
    Request,
    StoredWeight,
    WeightSpec,
)
from quantport.kernels.verdict import Claim, Evidence, Reason, ReasonCode, Refusal, Status
from quantport.scheme import Quant, Scheme

DECLARED = Claim(Evidence.DECLARED, "pure torch operators; the same code is tested on the CPU")


def native_reason(
    request: Request, format_name: str, kind: Refusal = Refusal.IMPOSSIBLE
) -> tuple[Reason, ...]:
    """The reason against a kernel that needs a matrix unit for ``format_name``, or nothing. ``kind``: what it
    does without.
    """
    arch = request.device.arch
    if format_name in arch.native:
        return ()
    text = f"{arch.name} ({arch.title}) has no {format_name} matrix instruction [{arch.source}]"
    return (Reason(text, kind, ReasonCode.NO_MATRIX_INSTRUCTION),)


class Portable(Kernel):
    """What needs nothing but elementwise operators and a matmul, of the dtypes that it meets."""

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        """A dtype of the activations, or of the weight, with which the device does nothing."""
        arch = request.device.arch
        if not arch.storage_only_dtypes:  # of most
            return ()
        met = {"activations": request.dtype, "the weight": request.weight.scheme.weight.element.storage}
        return [
            Reason(
                f"{arch.name} ({arch.title}) only stores {str(dtype).removeprefix('torch.')}, the "
                f"dtype of {name} [{arch.source}]"
            )
            for name, dtype in met.items()
            if dtype in arch.storage_only_dtypes
        ]

    def claim(self, request: Request) -> Claim:
        """The same code runs on the CPU."""
        return DECLARED


class Reference(Portable):
    """Exact emulation of the scheme, activations included: slow, right, everywhere."""

    name = "torch.reference"
    status = Status.REFERENCE
    tolerance = 2.0**-7
    quantizes_activations = True
    reads_input_scale = True

    def serves(self, scheme: Scheme) -> bool:
        return scheme.weight.format != "bf16"

    def slow(self, request: Request) -> str:
        return "it writes and reads an fp32 copy of the weight at every call"

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        return numerics.linear(x, self.unpack(packed, spec), replace(spec.scheme, rotation=0), bias)


class Dequantize(Portable):
    """Weights as asked, dequantized to the activation dtype at each call, then the device's own BF16
    matmul.
    """

    name = "torch.dequantize"
    status = Status.DEQUANTIZE
    tolerance = 2.0**-6

    def serves(self, scheme: Scheme) -> bool:
        return scheme.weight.format != "bf16"

    def slow(self, request: Request) -> str:
        return "it writes and reads a 16-bit copy of the weight at every call"

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        scheme = replace(spec.scheme, rotation=0)  # x is rotated already
        weight = numerics.dequantize_weight(self.unpack(packed, spec), scheme, spec.k, x.dtype)
        return torch.nn.functional.linear(x, weight, bias)


class Dense(Portable):
    """A layer that is not quantized: ``F.linear``."""

    name = "torch.linear"
    tolerance = 2.0**-6

    def serves(self, scheme: Scheme) -> bool:
        return scheme.weight.format == "bf16"

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        return torch.nn.functional.linear(x, packed[0].to(x.dtype), bias)


class Quantizing(Kernel):
    """A kernel that quantizes activations before it multiplies."""

    quantizes_activations = True

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        assert spec.scheme.activation is not None  # reasons_against refused it otherwise
        codes, scale = self.quantize(x, spec.scheme.activation)
        return self.run_codes(CodedRows(codes, scale, x.dtype), packed, bias, spec)

    def quantize(self, x: Tensor, quant: Quant) -> tuple[Tensor, Tensor]:
        """Codes and scales of activations; a room may have a faster way to the same bits."""
        return numerics.quantize(x, quant)


class ScaledMM(Quantizing):
    """W8A8 e4m3fn through ``torch._scaled_mm``: per-token activation scales, per-channel or per-tensor weight
    scales.

    Limits (``_meta_registrations.py``): K and N multiples of 16, row-major times column-major, bf16 output.
    """

    name = "aten._scaled_mm"
    tolerance = 2.0**-6

    def serves(self, scheme: Scheme) -> bool:
        weight, activation = scheme.weight, scheme.activation
        per_token = activation is not None and activation.block_shape == (1, 0)
        whole_rows = weight.block_shape[0] <= 1 and not weight.group_size
        return weight.format == "e4m3fn" and weight.scale == "fp32" and per_token and whole_rows

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        spec = request.weight
        reasons = list(native_reason(request, "e4m3fn"))
        if spec.n % 16 or spec.k % 16:
            reasons.append(
                Reason(f"{self.name} needs N and K to be multiples of 16, not {spec.n} x {spec.k}")
            )
        if request.dtype is not torch.bfloat16:
            reasons.append(Reason(f"{self.name} with row scales returns bfloat16 only, not {request.dtype}"))
        if not hasattr(torch, "_scaled_mm"):
            reasons.append(Reason("this torch has no _scaled_mm"))
        return reasons

    def claim(self, request: Request) -> Claim:
        return Claim(
            Evidence.DECLARED, "pytorch ScaledBlas.cpp: row-wise e4m3fn; the same call is tested on the CPU"
        )

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        return stored_weight["weight"].view(torch.uint8), stored_weight["weight_scale"].expand(
            spec.n, 1
        ).contiguous().view(1, spec.n)

    def packed_layout(self, spec: WeightSpec) -> PackedLayout | None:
        codes = PackedTensor((spec.n, spec.k), torch.uint8, rows=0)
        return PackedLayout((codes, PackedTensor((1, spec.n), torch.float32, rows=1)))

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        weight, scale = packed
        rows = spec.scheme.weight.scale_shape(spec.n, spec.k)[0]
        return {
            "weight": weight.view(torch.float8_e4m3fn),
            "weight_scale": scale.view(-1, 1)[:rows].contiguous(),
        }

    def run_codes(self, x: CodedRows, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        weight, row = packed
        columns = weight.view(x.codes.dtype).t()
        y = torch._scaled_mm(x.codes, columns, scale_a=x.scale, scale_b=row, out_dtype=torch.bfloat16)
        return y if bias is None else y + bias


class IntMM(Quantizing):
    """W8A8 int8 through ``torch._int_mm``: exact int32 sums, then per-token and per-channel scales in fp32.

    Limits (``_int_mm_out_cuda``): more than 16 rows (fewer are padded), K and N multiples of 8.
    """

    name = "aten._int_mm"
    tolerance = 2.0**-7

    def serves(self, scheme: Scheme) -> bool:
        quant = scheme.weight
        whole_rows = not quant.group_size and not quant.zero_point
        return quant.format == "int8" and scheme.activation is not None and whole_rows

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        spec = request.weight
        reasons = list(native_reason(request, "int8"))
        if spec.n % 8 or spec.k % 8:
            reasons.append(Reason(f"{self.name} needs N and K to be multiples of 8, not {spec.n} x {spec.k}"))
        return reasons

    def claim(self, request: Request) -> Claim:
        return Claim(
            Evidence.DECLARED, "pytorch native_functions.yaml _int_mm; the same call is tested on the CPU"
        )

    def run_codes(self, x: CodedRows, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        (weight, row), codes, rows = packed, x.codes, len(x.codes)
        if rows <= 16:
            codes = torch.nn.functional.pad(codes, (0, 0, 0, 32 - rows))
        y = torch._int_mm(codes, weight.t())[:rows] * x.scale * row.view(1, -1)
        return (y if bias is None else y + bias).to(x.dtype)


def kernels() -> tuple[Kernel, ...]:
    """The kernels that run on any torch device that has the operators."""
    return (ScaledMM(), IntMM(), *portable())


def portable() -> tuple[Kernel, ...]:
    """The kernels that need nothing but elementwise operators and a matmul."""
    return (Dense(), Dequantize(), Reference())
