"""The reference of each kernel of the NPU room: that of the scheme, with the deviation that the kernel
declares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantport import numerics
from quantport.kernels import aten
from quantport.kernels.base import Kernel, Packed, Request, StoredWeight, WeightSpec
from quantport.kernels.grouped import GroupedKernel, loop_over_groups
from quantport.kernels.verdict import Claim, Reason
from quantport.modules import QuantModule
from quantport.scheme import Scheme
from quantport.testing import cases
from quantport_npu.vendor import family

Linear = Callable[[Tensor, StoredWeight, Scheme, Tensor | None, torch.dtype], Tensor]


def scheme(
    x: Tensor, stored_weight: StoredWeight, scheme: Scheme, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The reference of the scheme, rounded once to ``dtype``."""
    return numerics.linear(x if x.dtype is dtype else x.float(), stored_weight, scheme, bias).to(dtype)


def int8(
    x: Tensor, stored_weight: StoredWeight, scheme: Scheme, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The scale of a token is amax / 127."""
    values = x.float()
    scale = values.abs().amax(1, keepdim=True) / 127
    codes = (values / torch.where(scale == 0, 1, scale)).round()
    sums = codes.double() @ stored_weight["weight"].double().t()
    y = sums.float() * stored_weight["weight_scale"].view(-1).float() * scale
    return (y if bias is None else y + bias.float()).to(dtype)


def int8_rounded(
    x: Tensor, stored_weight: StoredWeight, scheme: Scheme, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """As ``int8``, with scales of output channels in bf16 where the result is bf16."""
    scale = stored_weight["weight_scale"]
    scale = scale.to(dtype) if dtype is torch.bfloat16 else scale
    return int8(x, {**stored_weight, "weight_scale": scale}, scheme, bias, dtype)


def floor(
    x: Tensor, stored_weight: StoredWeight, asked: Scheme, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Scales of activations follow the OCP rule."""
    assert asked.activation
    return scheme(
        x, stored_weight, replace(asked, activation=replace(asked.activation, rule="floor")), bias, dtype
    )


def rounded(
    x: Tensor, stored_weight: StoredWeight, asked: Scheme, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Scales of weights are rounded to the dtype of the activations."""
    return scheme(
        x,
        {**stored_weight, "weight_scale": stored_weight["weight_scale"].to(x.dtype).float()},
        asked,
        bias,
        dtype,
    )


def divided(
    x: Tensor, stored_weight: StoredWeight, asked: Scheme, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Offsets are divided by their scales, rounded to the dtype of x, and added to the codes."""
    offset = (
        (stored_weight["weight_zero"].float() / stored_weight["weight_scale"].float()).to(x.dtype).float()
    )
    codes = numerics.unpack_int4(stored_weight["weight_packed"], x.shape[1]).double()
    wide = (
        t.double().repeat_interleave(asked.weight.group_size, 1)[:, : x.shape[1]]
        for t in (offset, stored_weight["weight_scale"])
    )
    y = x.double() @ ((codes + next(wide)) * next(wide)).t()
    return (y if bias is None else y + bias.double()).to(dtype)


DECLARED: dict[str, Linear] = {
    "npu.quant_matmul": int8,
    "npu.weight_quant_int8": rounded,
    "npu.weight_quant_fp8": rounded,
    "npu.weight_quant_int4_offset": divided,
    "npu.quant_matmul_mxfp8": floor,
    "npu.quant_matmul_mxfp4_w4a8": floor,
    "npu.grouped_matmul": int8_rounded,
    "npu.grouped_matmul_fp8": scheme,
    "npu.grouped_matmul_mxfp8_floor": scheme,
    "npu.grouped_matmul_mxfp8": floor,
    "npu.grouped_weight_int8": rounded,
}
# in the names of kernels that add a bias to the rounded product, which is rounded again
LATE = (
    "fp8",
    "mxfp8",
    "mxfp4",
)


class Declared(GroupedKernel, aten.Reference):
    """What a kernel of the room must compute, on the host, from weights that another kernel packed."""

    def __init__(self, kernel: Kernel, packer: Kernel) -> None:
        self.kernel, self.packer = kernel, packer
        self.linear = DECLARED.get(kernel.name, scheme)
        self.stacks: Any = packer if isinstance(packer, GroupedKernel) else super()
        self.stored: dict[int, tuple[Packed, StoredWeight]] = {}

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        return self.packer.pack(stored_weight, spec)

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        key = packed[0].data_ptr()
        if key not in self.stored:  # unpacking is for saving: some kernels take a product for it
            self.stored[key] = packed, {name: t.cpu() for name, t in self.packer.unpack(packed, spec).items()}
        return self.stored[key][1]

    def product(
        self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec, dtype: torch.dtype
    ) -> Tensor:
        """The product, rounded once to ``dtype``."""
        effective = spec.scheme if self.kernel.quantizes_activations else spec.scheme.weight_only
        late = bias is not None and any(name in self.kernel.name for name in LATE)
        y = self.linear(
            x, self.unpack(packed, spec), replace(effective, rotation=0), None if late else bias, dtype
        )
        return y + bias if late else y

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        return self.product(x, packed, bias, spec, x.dtype)

    def run_grouped(
        self,
        x: Tensor,
        offsets: Tensor,
        stack: Packed,
        bias: Tensor | None,
        spec: WeightSpec,
        shared: int = 1,
    ) -> Tensor:
        return loop_over_groups(
            lambda rows, packed, part: self.run(rows, packed, part, spec),
            x,
            offsets.tolist(),
            lambda g, j: self.expert_view(stack, g, j),
            bias,
            spec.n,
            shared,
        )

    def allocate(self, packed: Packed, groups: int, shared: int) -> Packed:
        return self.stacks.allocate(packed, groups, shared)

    def expert_view(self, stack: Packed, group: int, which: int) -> Packed:
        return self.stacks.expert_view(stack, group, which)

    def run_gated(
        self,
        x: Tensor,
        offsets: Tensor,
        gate_up: Packed,
        down: Packed,
        specs: tuple[WeightSpec, WeightSpec],
        activation: str,
    ) -> Tensor:
        """What lies between the products stays in fp32: where the kernel has one launch for gate, up and
        SwiGLU.
        """
        y, exact = torch.empty_like(x), torch.float32
        for i in range(offsets.numel() - 1):
            rows = slice(int(offsets[i]), int(offsets[i + 1]))
            if rows.start < rows.stop:
                gate, up = (
                    self.product(x[rows], self.expert_view(gate_up, i, j), None, specs[0], exact)
                    for j in range(2)
                )
                second, between = self.expert_view(down, i, 0), nn.functional.silu(gate) * up
                y[rows] = self.product(between, second, None, specs[1], x.dtype)
        return y


class Checked(Kernel):
    """A kernel each of whose products is compared with its reference, for the very activations that it got.

    Attributes:
        errors: The relative error of each call.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.name, self.errors = kernel, kernel.name, list[float]()
        self.reference = Declared(kernel, kernel)

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        """Those of the kernel."""
        return self.kernel.reasons_against(request)

    def claim(self, request: Request) -> Claim:
        """That of the kernel."""
        return self.kernel.claim(request)

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        """As the kernel packed them."""
        return self.kernel.unpack(packed, spec)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        """The kernel's own result."""
        return self._same(
            self.kernel.run(x, packed, bias, spec), self.reference.run(x.cpu(), packed, _host(bias), spec)
        )

    def _same(self, y: Tensor, told: Tensor) -> Tensor:
        self.errors.append(cases.relative_error(y, told))
        return y


class CheckedGroups(GroupedKernel, Checked):
    """As ``Checked``, for a kernel with one launch for all groups."""

    kernel: GroupedKernel

    def allocate(self, packed: Packed, groups: int, shared: int) -> Packed:
        """As the kernel."""
        return self.kernel.allocate(packed, groups, shared)

    def expert_view(self, stack: Packed, group: int, which: int) -> Packed:
        """As the kernel."""
        return self.kernel.expert_view(stack, group, which)

    def run_grouped(
        self,
        x: Tensor,
        offsets: Tensor,
        stack: Packed,
        bias: Tensor | None,
        spec: WeightSpec,
        shared: int = 1,
    ) -> Tensor:
        """The kernel's own result."""
        told = self.reference.run_grouped(x.cpu(), offsets.cpu(), stack, _host(bias), spec, shared)
        return self._same(self.kernel.run_grouped(x, offsets, stack, bias, spec, shared), told)

    def run_gated(
        self,
        x: Tensor,
        offsets: Tensor,
        gate_up: Packed,
        down: Packed,
        specs: tuple[WeightSpec, WeightSpec],
        activation: str,
    ) -> Tensor | None:
        """The kernel's own result."""
        y = self.kernel.run_gated(x, offsets, gate_up, down, specs, activation)
        if y is None:
            return None
        told = self.reference.run_gated(x.cpu(), offsets.cpu(), gate_up, down, specs, activation)
        return self._same(y, told)


def _host(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.cpu()


def modules(model: nn.Module) -> dict[str, QuantModule]:
    """The quantized modules of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantModule)}


def as_declared(model: nn.Module, like: nn.Module) -> None:
    """Makes a model on the host compute what the kernels of the same model on an NPU declare."""
    kernels = {name: module.kernel for name, module in modules(like).items()}
    for name, module in modules(model).items():
        kernel = Declared(kernels[name], aten.Reference())
        fits = getattr(kernels[name], "fits_fused", None)
        if fits is None or family() != "A5" or not fits(next(iter(module.specs.values()))):
            kernel.run_gated = lambda *given: None  # type: ignore[method-assign]  # it has no such launch here
        assert not module.others
        module.repack(kernel)


def check_each(model: nn.Module) -> list[Checked]:
    """Compares every later product of a model on an NPU with its reference."""
    checked = []
    for module in modules(model).values():
        grouped = isinstance(module.kernel, GroupedKernel)
        checked.append((CheckedGroups if grouped else Checked)(module.kernel))
        assert not module.others
        module.bind(checked[-1], {})
    return checked
