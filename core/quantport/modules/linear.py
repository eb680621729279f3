"""A linear layer with a quantized weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from quantport.kernel import Kernel, WeightSpec
from quantport.modules import ops
from quantport.modules.base import QuantModule


class WeightView(NamedTuple):
    """What code may ask of the weight of a linear layer that holds no 16-bit weight; ``dtype`` is that of activations."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class QuantLinear(QuantModule):
    """``y = x W^T + b`` with W quantized; stands where ``torch.nn.Linear`` stood.

    Args:
        kernel: The kernel that runs it.
        spec: Scheme and shape.
        bias: ``[n]`` or None; kept as given.
        dtype: Activation dtype that the kernel was chosen for.
    """

    def __init__(
        self, kernel: Kernel, spec: WeightSpec, bias: nn.Parameter | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__(kernel, {"": spec}, "linear", dtype)
        self.in_features, self.out_features = spec.k, spec.n
        self.spec = spec
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``x``."""
        packed, bias = self._packed[""], self._parameters["bias"]
        if torch.compiler.is_compiling():
            spec = self.spec
            y: Tensor = torch.ops.quantport.linear(x, packed, bias, self.kernel.name, spec.scheme.name, spec.n, spec.k)
            return y
        return ops.run_linear(self.kernel, x, packed, bias, self.spec)

    @property
    def weight(self) -> WeightView:
        """Shape, dtype and device of the weight, for code that asks a linear layer for them. It is no tensor."""
        return WeightView(torch.Size((self.out_features, self.in_features)), self.dtype, self.device)

    def extra_repr(self) -> str:
        """Shape, scheme and kernel."""
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, scheme={self.scheme}, kernel={self.kernel.name}"
