"""The base class of the room's kernels: limits, evidence, and several products where N exceeds the vendor's
limit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from quantport.backend import Claim, Evidence, Kernel, Packed, Reason, Request, WeightSpec, aten
from quantport_npu.vendor import LIMIT, SIMULATED, TEST, WHEEL, lacking

Calls = Mapping[str, tuple[str, ...]]
HALVES = (torch.float16, torch.bfloat16)
PART = LIMIT // 128 * 128  # output channels of one product, a whole number of blocks of scales


def parts(n: int) -> list[slice]:
    """Slices of ``n`` output channels, each within the vendor's limit."""
    return [slice(0, n)] if n <= LIMIT else [slice(i, min(i + PART, n)) for i in range(0, n, PART)]


def to_pairs(scale: Tensor) -> Tensor:
    """Scales ``[n, groups]`` in pairs, as the MX operators take them: ``[n, ceil(groups / 2), 2]``, padded
    with a zero.
    """
    return torch.nn.functional.pad(scale, (0, scale.shape[1] % 2)).view(scale.shape[0], -1, 2)


def from_pairs(scale: Tensor, groups: int) -> Tensor:
    """The inverse of ``to_pairs``."""
    return scale.view(scale.shape[0], -1)[:, :groups].contiguous()


class NpuKernel(Kernel):
    """A product of one of Ascend's operators.

    Attributes:
        unit: Format that the cube unit must multiply.
        calls: Operators that it calls, with those of their arguments that not every build has.
        source: The vendor's documents.
    """

    unit: str
    calls: ClassVar[Calls]
    source: ClassVar[str]
    tolerance = 2.0**-6

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        """The format, the dtype of the activations, the limit of K, and operators that the installed build
        lacks.
        """
        spec, arch = request.weight, request.device.arch
        reasons = list(aten.native_reason(request, self.unit))
        if request.dtype not in HALVES:
            reasons.append(Reason(f"{self.name} takes float16 and bfloat16, not {request.dtype}"))
        elif request.dtype is torch.bfloat16 and "bf16" not in arch.native:
            reasons.append(Reason(f"{arch.name} ({arch.title}) has no bfloat16 [{arch.source}]"))
        if spec.k > LIMIT:
            reasons.append(Reason(f"{self.name} takes K up to {LIMIT}, not {spec.k} [{self.source}]"))
        if not request.device.simulated:
            reasons += [
                Reason(why) for call, arguments in self.calls.items() if (why := lacking(call, arguments))
            ]
        return reasons

    def claim(self, request: Request) -> Claim:
        """The vendor's documents, and what ran over the simulated driver."""
        arch = request.device.arch
        if arch.name in SIMULATED:
            return Claim(Evidence.SIMULATED, f"{WHEEL} over a simulated driver: {TEST}; {self.source}")
        return Claim(Evidence.DECLARED, f"{self.source}; {arch.source}")

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        """Quantizes the activations once, and multiplies part by part."""
        if not x.shape[0]:  # the operators take no empty tensors
            return x.new_empty(0, spec.n)
        q = self.activations(x, spec)
        outputs = [
            self.multiply(q, packed, part, None if bias is None else bias[part], x.dtype, spec)
            for part in parts(spec.n)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def activations(self, x: Tensor, spec: WeightSpec) -> Packed:
        """The activations as ``multiply`` takes them: quantized, or as they are for weight-only kernels."""
        return (x,)

    @abstractmethod
    def multiply(
        self,
        q: Packed,
        packed: Packed,
        part: slice,
        bias: Tensor | None,
        dtype: torch.dtype,
        spec: WeightSpec,
    ) -> Tensor:
        """Multiplies the activations by the output channels of one part.

        Args:
            q: Of ``activations``.
            packed: Of ``pack``, for all output channels.
            part: One of ``parts``.
            bias: That of the part.
            dtype: Dtype of the result.
            spec: Scheme and shape of the whole weight.

        Returns:
            ``[m, part.stop - part.start]``.
        """
