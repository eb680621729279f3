"""What others have hung onto a module goes on to the one that takes its place. Where it cannot, the module
stays.
"""

from __future__ import annotations

import warnings
import weakref
from functools import cache
from typing import Any

import torch
from torch import nn

from quantport.model.roles import SkipCode, SkipReason
from quantport.modules import QuantEmbedding, QuantModule
from quantport.modules.base import EMPTY_WEIGHT

# Of nn.Module: dicts that the handles of hooks refer to, so they are shared, not copied.
_CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


_PLAIN = (nn.Linear, nn.Embedding)


@cache
def _fresh(kind: str) -> frozenset[str]:
    """The attributes of a linear layer or embedding onto which nothing was hung. Made when it is asked for:
    torch imports its compiler to initialize one.
    """
    return frozenset(vars(getattr(nn, kind)(1, 1, dtype=torch.float32, device="meta")))


def why_not_replaced(module: nn.Module) -> SkipReason | None:
    """Why a module cannot be replaced without losing what was hung onto it, or None."""
    text = ""
    if "forward" in vars(module):
        text = "its forward was exchanged, as accelerate does: remove that, quantize, and put it on again"
    elif any(vars(module)[hooks] for hooks in _STATE_HOOKS):
        text = "it has hooks on its state dict, which know its 16-bit weight"
    elif type(module) in _PLAIN and (named := _stored_names(module)):
        text = f"it has a tensor {named[0]!r}, as a quantized weight is stored"
    return SkipReason(SkipCode.HOOKED, text) if text else None


def _stored_names(module: nn.Module) -> list[str]:
    """The further tensors of a module whose names may be those of a stored weight (``Scheme.layout``)."""
    names = [*module._parameters, *module._buffers]
    return [
        name for name in names if name != "weight" and name.startswith(("weight", "packed_", EMPTY_WEIGHT))
    ]


def carry_over(old: nn.Module, new: nn.Module, path: str) -> None:
    """Hangs the hooks and attributes of a module onto the one that takes its place; of linear layers and
    embeddings further parameters, buffers and modules too.

    An attribute that ``new`` has itself stays its own; a warning names one that somebody gave to ``old``.
    """
    for name in _CALL_HOOKS:
        vars(new)[name] = vars(old)[name]
    own = _fresh(type(old).__name__) if type(old) in _PLAIN else frozenset(vars(old))
    held = vars(new)
    for name, value in vars(old).items():
        if name in held and name in own:
            continue  # most are
        if name not in held and not hasattr(type(new), name):
            held[name] = value
        elif name not in own:
            text = f"attribute {name!r} of {path} is lost: a quantized module has its own of this name"
            warnings.warn(text, stacklevel=2)
    if type(old) in _PLAIN:
        new._parameters.update((k, p) for k, p in old._parameters.items() if k not in ("weight", "bias"))
        new._modules.update(old._modules)
        new._buffers.update(old._buffers)
        new._non_persistent_buffers_set.update(old._non_persistent_buffers_set)


def count_quantized(model: nn.Module) -> None:
    """Lets ``num_parameters`` of Transformers models count quantized weights, which are no parameters."""
    for module in model.modules():
        if hasattr(type(module), "num_parameters"):
            vars(module)["num_parameters"] = _NumParameters(module)


class _NumParameters:
    """``num_parameters`` of one model, which it refers to weakly: it must not keep its own model alive."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        model: Any = self._model()
        count: int = type(model).num_parameters(model, only_trainable, exclude_embeddings)
        if only_trainable:
            return count
        quantized = [m for m in model.modules() if isinstance(m, QuantModule)]
        left_out = QuantEmbedding if exclude_embeddings else ()
        specs = [s for m in quantized if not isinstance(m, left_out) for s in m.specs.values()]
        return count + sum(spec.n * spec.k for spec in specs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _NumParameters, (self._model(),)
