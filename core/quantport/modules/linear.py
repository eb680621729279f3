"""A linear layer with a quantized weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantport.kernels.base import Kernel, Packed, RowFunction, WeightSpec
from quantport.modules import ops
from quantport.modules.base import QuantModule
from quantport.modules.weight_view import WeightView
from quantport.plugins.registry import Registry


class QuantLinear(QuantModule, nn.Linear):
    """``y = x W^T + b`` with W quantized; stands where ``torch.nn.Linear`` stood, and is one: PEFT and others
    ask for that.

    A gradient goes to the activations (through the dequantized weight) and the bias, never to the weight.

    Args:
        kernel: The kernel that runs it.
        spec: Scheme and shape.
        bias: ``[n]`` or None; kept as given.
        dtype: Activation dtype that the kernel was chosen for.
        registry: As for ``QuantModule``.
    """

    spec: WeightSpec
    _row: tuple[str, Tensor | None, RowFunction | None]

    def __init__(
        self,
        kernel: Kernel,
        spec: WeightSpec,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.bfloat16,
        registry: Registry | None = None,
    ) -> None:
        super().__init__(kernel, {"": spec}, "linear", dtype, registry=registry)
        self.__dict__.update(in_features=spec.k, out_features=spec.n, spec=spec)  # as in ``QuantModule``
        self.register_parameter("bias", bias)

    def bind(self, kernel: Kernel, others: Mapping[str, Kernel]) -> None:
        """Takes another kernel, which reads the packed weight as it is."""
        super().bind(kernel, others)
        # which buffer begins the packed weight that it is of, that buffer, and it
        self.__dict__["_row"] = "", None, None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``x``."""
        bias = self._parameters["bias"]
        if bias is None and ops.is_plain_call(x):
            key, first, function = self._row
            if first is None or self._buffers[key] is not first:
                function = self._find_row_function(self.packed())
            y = None if function is None else function(x)
            if y is not None:
                return y
        return ops.linear(self.bound[""], x, self.packed(), bias)

    def _find_row_function(self, packed: Packed) -> RowFunction | None:
        rotates = bool(self.spec.scheme.rotation)
        function = None if rotates else self.kernel_of("").row_function(packed, self.spec)
        self._row = self._buffer_names[""][0], packed[0], function
        return function

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["_row"]
        return state

    @property
    def weight(self) -> WeightView:  # type: ignore[override]  # of nn.Linear it is a Parameter
        """Shape, dtype and device of the weight, for code that asks a linear layer for them. It is no
        tensor.
        """
        return WeightView(torch.Size((self.out_features, self.in_features)), self.dtype, self.device)

    def extra_repr(self) -> str:
        """Shape, scheme and kernel."""
        bias = self.bias is not None
        return (
            f"{self.in_features}, {self.out_features}, bias={bias}, scheme={self.scheme}, "
            f"kernel={self.kernel.name}"
        )


class QuantFused(QuantModule, nn.Linear):
    """A linear layer of several projections stored as one, each quantized by itself; their outputs stand side
    by side.

    Args:
        kernel: The kernel that runs every projection.
        specs: Name of each projection -> scheme and shape, in the order of the outputs.
        bias: ``[n]`` of all projections, or None; kept as given.
        dtype: Activation dtype that the kernel was chosen for.
        registry: As for ``QuantModule``.
    """

    def __init__(
        self,
        kernel: Kernel,
        specs: dict[str, WeightSpec],
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.bfloat16,
        registry: Registry | None = None,
    ) -> None:
        super().__init__(kernel, specs, "linear", dtype, registry=registry)
        self.in_features, self.out_features = next(iter(specs.values())).k, sum(s.n for s in specs.values())
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``x``."""
        bias = self._parameters["bias"]
        each = [None] * len(self.specs) if bias is None else bias.split([s.n for s in self.specs.values()])
        out = [
            ops.linear(bound, x, self.packed(name), b)
            for (name, bound), b in zip(self.bound.items(), each, strict=True)
        ]
        return torch.cat(out, -1)

    @property
    def weight(self) -> WeightView:  # type: ignore[override]  # of nn.Linear it is a Parameter
        """Shape, dtype and device of the weight of all projections. It is no tensor."""
        return WeightView(torch.Size((self.out_features, self.in_features)), self.dtype, self.device)

    def extra_repr(self) -> str:
        """Shapes, scheme and kernel."""
        parts = ", ".join(f"{name} {spec.n}" for name, spec in self.specs.items())
        return (
            f"{self.in_features}, {self.out_features} ({parts}), scheme={self.scheme}, "
            f"kernel={self.kernel.name}"
        )
