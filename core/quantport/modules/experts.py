"""The experts of a MoE layer with quantized weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from threading import Lock

import torch
from torch import Tensor, nn

from quantport.kernels.base import Kernel, Packed, WeightSpec
from quantport.kernels.grouped import StackedKernel
from quantport.model.layers import PROJECTIONS
from quantport.modules import routing
from quantport.modules.base import QuantModule
from quantport.modules.ops import Differentiable
from quantport.scheme import Scheme

_ALLOCATING = Lock()  # weights are packed by several threads
_NAMES = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
}


class QuantExperts(QuantModule):
    """Gate, up and down projections of every expert; stands where the experts module of Transformers stood.

    Each projection of each expert is quantized by itself, as checkpoints store them, whether the model fuses
    them or not.

    Args:
        kernel: The kernel that runs every projection, but for ``others``.
        gate_up: Scheme and shape [intermediate, hidden] of gate and up.
        down: Scheme and shape [hidden, intermediate] of down.
        experts: Number of experts.
        activation: Name of the activation function.
        dtype: Activation dtype that the kernel was chosen for.
        others: Weight name (``3.down_proj``) -> kernel and scheme, for those that differ.
    """

    def __init__(
        self,
        kernel: Kernel,
        gate_up: WeightSpec,
        down: WeightSpec,
        experts: int,
        activation: str,
        dtype: torch.dtype = torch.bfloat16,
        others: Mapping[str, tuple[Kernel, Scheme]] | None = None,
    ) -> None:
        specs = {
            f"{e}.{p}": down if p == "down_proj" else gate_up for e in range(experts) for p in PROJECTIONS
        }
        specs |= {name: replace(specs[name], scheme=scheme) for name, (_, scheme) in (others or {}).items()}
        super().__init__(
            kernel, specs, "moe", dtype, {name: other for name, (other, _) in (others or {}).items()}
        )
        self.num_experts, self.gate_up, self.down, self.activation = experts, gate_up, down, activation
        self._slots: dict[str, Packed] = {}  # of weights that will lie side by side, while some are missing

    def _install(self, name: str, packed: Packed) -> None:
        kernel = self.kernel_of(name)
        if isinstance(kernel, StackedKernel):
            packed = self._in_slot(kernel, name, packed)
        super()._install(name, packed)
        if len(self._packed) == len(self.specs):
            self._slots = {}

    def _in_slot(self, kernel: StackedKernel, name: str, packed: Packed) -> Packed:
        """Copies a packed weight into its slot of the stack, which the first weight of a group makes."""
        slot = self._packed.get(name)
        if slot is None:
            with _ALLOCATING:
                if name not in self._slots:
                    self._slots |= self._room(kernel, name, packed)
            slot = self._slots[name]
        if any(to.device != t.device for to, t in zip(slot, packed, strict=True)):
            return packed  # moved from outside, tensor by tensor: ``bundle`` copies it when it runs
        for to, t in zip(slot, packed, strict=True):
            to.copy_(t)
        return slot

    def _room(self, kernel: StackedKernel, name: str, packed: Packed) -> dict[str, Packed]:
        """Slots for all weights that one call will multiply together with this one."""
        named = [routing.Weight(self.kernel_of(n), spec, n) for n, spec in self.specs.items()]
        group = next(g for g in chain(*routing.groups(named)) if name in g.packed)
        stack = kernel.stack(packed, group.last - group.first, group.shared)
        return {n: kernel.slot(stack, *divmod(i, group.shared)) for i, n in enumerate(group.packed)}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Routes ``[T, hidden]`` by ``top_k_index`` and ``top_k_weights`` ``[T, top_k]``; returns ``[T,
        hidden]``.
        """
        if torch.compiler.is_compiling():
            y: Tensor = torch.ops.quantport.experts(
                hidden_states, top_k_index, top_k_weights, *self.operands()
            )
            return y
        wants = torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
        tables = self._grouped(Differentiable) if wants else self._kept()
        return routing.run_experts(hidden_states, top_k_index, top_k_weights, tables, self.activation)

    def _kept(self) -> routing.Tables:
        """The groups of the packed weights, made anew when those have moved."""
        first = self.packed(next(iter(self.specs)))[0]
        if self._tables is None or self._tables[0] is not first:
            self._tables = (first, self._grouped(lambda kernel: kernel))
        tables: routing.Tables = self._tables[1]
        return tables

    def _grouped(self, wrap: Callable[[Kernel], Kernel]) -> routing.Tables:
        weights = [
            routing.Weight(wrap(self.kernel_of(n)), spec, self.packed(n)) for n, spec in self.specs.items()
        ]
        return routing.tables(weights)

    def operands(self) -> tuple[list[Tensor], list[int], list[str], list[str], int, int, int, str]:
        """What ``quantport::experts`` is called with after the activations and the routing."""
        packed = [self.packed(name) for name in self.specs]
        sizes, kernels, schemes = [len(packed[0])], [self.kernel.name], [self.gate_up.scheme.name]
        if self.others:
            sizes = [len(p) for p in packed]
            kernels = [self.kernel_of(name).name for name in self.specs]
            schemes = [spec.scheme.name for spec in self.specs.values()]
        flat = [t for p in packed for t in p]
        return (
            flat,
            sizes,
            kernels,
            schemes,
            self.num_experts,
            self.gate_up.k,
            self.gate_up.n,
            self.activation,
        )

    def extra_repr(self) -> str:
        """Shape, scheme and kernel."""
        kernels = " + ".join(dict.fromkeys(self.kernel_of(name).name for name in self.specs))
        shape = f"{self.num_experts} experts, {self.gate_up.k}, {self.gate_up.n}"
        return f"{shape}, scheme={self.scheme}, kernel={kernels}"


def why_not_experts(module: nn.Module) -> str:
    """Why a module with fused expert weights cannot become ``QuantExperts``, or an empty string."""
    if getattr(module, "is_transposed", False):
        return "its experts are stored transposed"
    if getattr(module, "has_bias", False) or any(
        "bias" in name for name, _ in module.named_parameters(recurse=False)
    ):
        return "its experts have biases"
    if not getattr(module, "is_concatenated", True):
        return "its gate and up projections are interleaved"
    if getattr(module, "has_post_expert_norm", False):
        return "it normalizes the output of each expert"
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__name__ != "_default_apply_gate":
        return "it has a gating function of its own"
    if activation_name(module) is None:
        return f"its activation {type(getattr(module, 'act_fn', None)).__name__} is not known"
    return ""


def activation_name(module: nn.Module) -> str | None:
    """Name of the activation function of an experts module, or None when it is not one that quantport
    runs.
    """
    return _NAMES.get(type(getattr(module, "act_fn", None)).__name__)
