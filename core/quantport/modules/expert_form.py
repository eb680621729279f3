"""How the experts modules of Transformers store their weights, and what they compute beside the products."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantport.kernels.grouped import ACTIVATIONS

_NAMES = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
}
_WEIGHTS = ("gate_up_proj", "down_proj")
_BIASES = ("gate_up_proj_bias", "down_proj_bias")
# Transformers 5.23. The first gives each expert an equal share of the rows, one after the other; the second
# has all experts one below the other in ``mlp.w1``, ``mlp.v1`` and, transposed, ``mlp.w2``.
_SORTED, _FLAT = "Llama4TextExperts", "DbrxExperts"
FLAT_WEIGHTS = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}


class OwnGate:
    """The function of an experts module between its products (``_apply_gate``), without its weights.

    Args:
        module: The experts module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = copy.copy(module)
        vars(self.module)["_parameters"] = {}

    def __call__(self, gate_up: Tensor) -> Tensor:
        """``[T, 2 * intermediate]`` to ``[T, intermediate]``."""
        out: Tensor = self.module._apply_gate(gate_up)
        return out


@dataclass(frozen=True)
class ExpertForm:
    """What an experts module is beside the shapes of its weights.

    Attributes:
        activation: Name in ``ACTIVATIONS``; empty where ``gate`` says what is computed.
        gate: What is computed of gate and up, in the order of the module, where it is no plain activation.
        interleaved: Whether the rows of gate and up take turns, rather than lie one below the other.
        biases: Names of the biases ``[experts, 2 * intermediate]``, in the order of the weight, and
            ``[experts, hidden]``; empty without.
        is_sorted: Whether it gets an equal number of rows for each expert, one after the other, and no
            routing.
        flat: Whether one weight of ``mlp`` holds a projection of all experts, one below the other
            (`FLAT_WEIGHTS`).
    """

    activation: str
    gate: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)
    interleaved: bool = False
    biases: tuple[str, ...] = ()
    is_sorted: bool = False
    flat: bool = False

    @property
    def name(self) -> str:
        """What tells forms apart whose arithmetic differs; for a gate only as long as that lives."""
        first = self.activation if self.gate is None else f"gate-{id(self.gate):x}"
        return "+".join((first, *(("interleaved",) if self.interleaved else ()), *self.biases))

    @property
    def plain(self) -> bool:
        """Whether it is ``activation(gate) * up`` and nothing else, which kernels compute by themselves."""
        return self.gate is None and not self.interleaved and not self.biases

    def between(self, gate_up: Tensor, biases: Sequence[Tensor], experts: Tensor | None) -> Tensor:
        """What is multiplied by down: ``[T, intermediate]``.

        Args:
            gate_up: Products of gate beside those of up ``[T, 2 * intermediate]``.
            biases: As ``biases`` names them, or none.
            experts: The expert of each row; None without biases.
        """
        if self.interleaved:
            gate_up = gate_up.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        if biases:
            gate_up = gate_up + biases[0][experts]
        if self.gate is not None:
            return self.gate(gate_up)
        gate, up = (gate_up[:, ::2], gate_up[:, 1::2]) if self.interleaved else gate_up.chunk(2, -1)
        return ACTIVATIONS[self.activation](gate) * up


def expert_form(module: nn.Module) -> ExpertForm | str:
    """The form of an experts module, or why it cannot become ``QuantExperts``."""
    kind = type(module).__name__
    if kind == _FLAT:
        activation = _activation(getattr(module, "mlp", None), "activation_fn")
        return ExpertForm(activation, flat=True) if activation else _unknown(module)
    if not all(hasattr(module, name) for name in _WEIGHTS):
        return f"its experts are a {kind}, without gate_up_proj and down_proj"
    others = [n for n, _ in module.named_parameters() if n not in (*_WEIGHTS, *_BIASES)]
    if others:
        return f"its experts have parameters of their own: {others[0]}"
    biases = tuple(name for name in _BIASES if getattr(module, name, None) is not None)
    if len(biases) == 1:
        return f"its experts have a bias {biases[0]} alone"
    if getattr(module, "has_post_expert_norm", False):
        return "it normalizes the output of each expert"
    is_called = type(module).forward is not nn.Module.forward
    if is_called and len(inspect.signature(module.forward).parameters) == 1 and kind != _SORTED:
        return f"its experts are a {kind}, which is called without a routing"
    interleaved = not getattr(module, "is_concatenated", True)
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__name__ != "_default_apply_gate":
        own = OwnGate(module)
        why = _why_not_gate(own)
        return why or ExpertForm("", own, interleaved, biases)
    activation = _activation(module, "act_fn")
    if not activation:
        return _unknown(module)
    return ExpertForm(activation, None, interleaved, biases, kind == _SORTED)


def holds_transposed(module: Any, intermediate: int, hidden: int) -> bool:
    """Whether an experts module holds its matrices as ``[in_features, out_features]``; where one of them is
    square the other shows it.
    """
    shapes = tuple(tuple(getattr(module, name).shape[1:]) for name in _WEIGHTS)
    return shapes == ((hidden, 2 * intermediate), (intermediate, hidden))


def parse_form(name: str) -> ExpertForm | None:
    """The form of a name, or None: a gate has a name only while it lives."""
    first, *rest = name.split("+")
    interleaved, biases = "interleaved" in rest, tuple(part for part in rest if part != "interleaved")
    return ExpertForm(first, None, interleaved, biases) if first in ACTIVATIONS else None


def _activation(module: Any, name: str) -> str:
    """Name of an activation function that quantport runs; empty for any other."""
    return _NAMES.get(type(getattr(module, name, None)).__name__, "")


def _unknown(module: nn.Module) -> str:
    function = getattr(module, "act_fn", None) or getattr(getattr(module, "mlp", None), "activation_fn", None)
    return f"its activation {type(function).__name__} is not known"


def _why_not_gate(gate: OwnGate) -> str:
    """Why a gating function cannot be called without the weights of its module, or an empty string."""
    parts = [*gate.module.parameters(), *gate.module.buffers()]
    if parts:
        return "its gating function has tensors of its own"
    try:
        out = gate(torch.empty(1, 64, dtype=torch.bfloat16, device="meta"))
    except Exception as error:  # whatever a stranger's function raises
        return f"its gating function cannot be called alone: {type(error).__name__}"
    return "" if out.shape == (1, 32) else "its gating function does not make one column of two"
