"""A linear layer with a quantized weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantport.kernel import Kernel, WeightSpec
from quantport.modules import ops
from quantport.modules.base import QuantModule


class QuantLinear(QuantModule):
    """``y = x W^T + b`` with W quantized; stands where ``torch.nn.Linear`` stood.

    Args:
        kernel: The kernel that runs it.
        spec: Scheme and shape.
        bias: ``[n]`` or None; kept as given.
    """

    def __init__(self, kernel: Kernel, spec: WeightSpec, bias: nn.Parameter | None = None) -> None:
        super().__init__(kernel, {"": spec}, "linear")
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

    def extra_repr(self) -> str:
        """Shape, scheme and kernel."""
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, scheme={self.scheme}, kernel={self.kernel.name}"
