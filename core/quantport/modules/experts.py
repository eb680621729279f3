"""The experts of a MoE layer with quantized weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import is_
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from quantport.errors import RoutingError
from quantport.kernels.base import Kernel, Packed, WeightSpec
from quantport.kernels.grouped import GroupedKernel
from quantport.model.layers import PROJECTIONS
from quantport.modules import ops
from quantport.modules.base import QuantModule
from quantport.modules.expert_form import ExpertForm
from quantport.modules.expert_layout import GroupWeights, bind_experts
from quantport.modules.routing import run_experts
from quantport.modules.weight_view import WeightView
from quantport.plugins.registry import Registry
from quantport.scheme import Scheme

_ALLOCATING = Lock()  # weights are packed by several threads
_OF_LAYOUT = ("layout", "_places", "_handle", "_one_launch", "_operands", "_tables")  # made by ``bind``


class QuantExperts(QuantModule):
    """Gate, up and down projections of every expert; stands where the experts module of Transformers stood.

    Each projection of each expert is quantized by itself, as checkpoints store them, whether the model fuses
    them or not.

    Args:
        kernel: The kernel that runs every projection, but for ``others``.
        gate_up: Scheme and shape [intermediate, hidden] of gate and up.
        down: Scheme and shape [hidden, intermediate] of down.
        experts: Number of experts.
        form: What is computed beside the products; a text is the name of an activation function.
        dtype: Activation dtype that the kernel was chosen for.
        others: Weight name (``3.down_proj``) -> kernel and scheme, for those that differ.
        registry: As for ``QuantModule``.
        biases: As ``form`` names them.
    """

    def __init__(
        self,
        kernel: Kernel,
        gate_up: WeightSpec,
        down: WeightSpec,
        experts: int,
        form: ExpertForm | str,
        dtype: torch.dtype = torch.bfloat16,
        others: Mapping[str, tuple[Kernel, Scheme]] | None = None,
        registry: Registry | None = None,
        biases: Sequence[nn.Parameter] = (),
    ) -> None:
        specs = {
            f"{e}.{p}": down if p == "down_proj" else gate_up for e in range(experts) for p in PROJECTIONS
        }
        specs |= {name: replace(specs[name], scheme=scheme) for name, (_, scheme) in (others or {}).items()}
        # before the weights are bound: it belongs to the layout
        self._form = ExpertForm(form) if isinstance(form, str) else form
        kernels = {name: other for name, (other, _) in (others or {}).items()}
        super().__init__(kernel, specs, "moe", dtype, kernels, registry)
        self.num_experts, self.gate_up, self.down = experts, gate_up, down
        for name, bias in zip(self._form.biases, biases, strict=True):
            self.register_parameter(name, bias)

    def bind(self, kernel: Kernel, others: Mapping[str, Kernel]) -> None:
        """Takes other kernels, which read the packed weights as they are."""
        super().bind(kernel, others)
        self.layout = bind_experts(self.bound, self._form)
        names = list(self.specs)
        self._places = {names[m]: (g, i) for g in self.layout.groups for i, m in enumerate(g.members)}
        self._handle, self._one_launch = self.layout.handle, self.layout.one_launch
        self._operands: tuple[list[str], list[int]] = [], []  # buffers and sizes, once every weight is there
        self._tables: tuple[tuple[Tensor | None, ...], list[GroupWeights]] | None = None
        self._find_operands_once()

    @property
    def form(self) -> ExpertForm:
        """What is computed beside the products; another one is bound at once."""
        return self._form

    @form.setter
    def form(self, form: ExpertForm) -> None:
        self._form = form
        self.bind(self.kernel, self.others)

    @property
    def gate_up_proj(self) -> WeightView:
        """What code may ask of the stacked weights of gate and up, ``[experts, out, in]`` whatever its class
        has: its block draws them in Qwen3-Omni.
        """
        shape = (self.num_experts, 2 * self.gate_up.n, self.gate_up.k)
        return WeightView(torch.Size(shape), self.dtype, self.device)

    @property
    def down_proj(self) -> WeightView:
        """What code may ask of the stacked weights of down, as those."""
        return WeightView(torch.Size((self.num_experts, self.down.n, self.down.k)), self.dtype, self.device)

    def packed(self, name: str = "") -> Packed:
        """The packed tensors of one weight: views, where it lies in a stack."""
        group, place = self._places[name]
        kernel = group.bound.kernel
        if not isinstance(kernel, GroupedKernel):
            return super().packed(name)
        stack = tuple(self.get_buffer(key) for key in self._buffer_names[name])
        return kernel.expert_view(stack, *divmod(place, group.shared))

    def _install(self, name: str, packed: Packed) -> None:
        group, place = self._places[name]
        kernel = group.bound.kernel
        if not isinstance(kernel, GroupedKernel):
            super()._install(name, packed)
            return
        keys = tuple(f"packed_{group.name}_{i}" for i in range(len(packed)))
        with _ALLOCATING:
            if keys[0] not in self._buffers:
                stack = kernel.allocate(packed, group.last - group.first, group.shared)
                for key, tensor in zip(keys, stack, strict=True):
                    self.register_buffer(key, tensor, persistent=False)
        view = kernel.expert_view(tuple(map(self.get_buffer, keys)), *divmod(place, group.shared))
        for to, tensor in zip(view, packed, strict=True):
            to.copy_(tensor)
        self._set(name, keys)

    def _set(self, name: str, keys: tuple[str, ...]) -> None:
        super()._set(name, keys)
        self._find_operands_once()

    def _find_operands_once(self) -> None:
        if not self._operands[0] and len(self._buffer_names) == len(self.specs):
            self._operands = self._find_operands()

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Routes ``[..., hidden]``, T rows, by ``top_k_index`` and ``top_k_weights`` ``[T, top_k]``; returns
        as many in the dtype of ``hidden_states``. Under autocast it is cast to the dtype of that before.

        Experts whose form is sorted get no routing: each an equal share of the rows, one after the other.
        """
        if hidden_states.dim() != 2:
            flat = hidden_states.reshape(-1, hidden_states.shape[-1])
            return self.forward(flat, top_k_index, top_k_weights).view(hidden_states.shape)
        if self._form.is_sorted:
            each = torch.arange(self.num_experts, device=hidden_states.device, dtype=torch.int64)
            top_k_index = each.repeat_interleave(len(hidden_states) // self.num_experts)[:, None]
            top_k_weights = hidden_states.new_ones(top_k_index.shape)
        if top_k_index is None or top_k_weights is None:
            raise RoutingError(
                "run experts", "activations without a routing", "top_k_index and top_k_weights [T, top_k]"
            )
        if ops.is_autocast(hidden_states):
            x = ops.autocast(hidden_states)
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x, top_k_index, top_k_weights).to(hidden_states.dtype)
        wants = ops.wants_gradient(hidden_states, top_k_weights)
        if torch.compiler.is_compiling():
            name = "experts" if self._one_launch else "experts_loop"
            if not wants and not torch.compiler.is_exporting():  # as for a linear layer
                name += "_no_grad"
            run = getattr(torch.ops.quantport, name)
            y: Tensor = run(hidden_states, top_k_index, top_k_weights, *self.operands())
            return y
        packed, multiply = self._group_weights(), ops.run_linear if wants else None
        biases = self._biases() if self._form.biases else ()
        return run_experts(hidden_states, top_k_index, top_k_weights, self.layout, packed, biases, multiply)

    def _biases(self) -> list[Tensor]:
        return [self.get_parameter(name) for name in self._form.biases]

    def _group_weights(self) -> list[GroupWeights]:
        """The packed weights of each group, gathered anew when a buffer has been exchanged."""
        buffers = tuple(self._buffers.values())
        if self._tables is None or not _same(buffers, self._tables[0]):
            self._tables = buffers, self.layout.weights(*self.operands()[:2])
        return self._tables[1]

    def operands(self) -> tuple[list[Tensor], list[int], str]:
        """What the operators are called with after the activations and the routing: the tensors of each
        group and the biases, the number of the former for one stack or one weight of each group, and the
        handle.
        """
        keys, sizes = self._operands
        return [*(self.get_buffer(key) for key in keys), *self._biases()], sizes, self._handle

    def _find_operands(self) -> tuple[list[str], list[int]]:
        names, keys, sizes = list(self.specs), list[str](), list[int]()
        for group in self.layout.groups:
            grouped = isinstance(group.bound.kernel, GroupedKernel)
            each = [self._buffer_names[names[m]] for m in (group.members[:1] if grouped else group.members)]
            keys += [key for own in each for key in own]
            sizes.append(len(each[0]))
        return keys, sizes

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {k: v for k, v in state.items() if k not in _OF_LAYOUT}

    def extra_repr(self) -> str:
        """Shape, scheme and kernel."""
        kernels = " + ".join(dict.fromkeys(self.kernel_of(name).name for name in self.specs))
        shape = f"{self.num_experts} experts, {self.gate_up.k}, {self.gate_up.n}"
        return f"{shape}, scheme={self.scheme}, kernel={kernels}"


def _same(buffers: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    return len(buffers) == len(others) and all(map(is_, buffers, others))
