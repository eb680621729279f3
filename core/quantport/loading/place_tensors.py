"""Where each stored tensor goes in a model, and in which dtype it is held there."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from quantport.device import Device
from quantport.model.layers import FLOATS, Layer
from quantport.model.roles import SkipCode, SkipReason

HALVES = (torch.bfloat16, torch.float16)
_FLOATING = (*FLOATS, torch.float64)
# of names that a module itself is silent on: buffers that Transformers keeps elsewhere now
_MOVED = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}


def main_dtype(layers: Sequence[Layer], config: Mapping[str, Any], target: Device) -> torch.dtype:
    """The dtype of a checkpoint: the one that its weights have; of several the one that ``config.json``
    names, or else that of the most elements, of equally many the narrower: what is wider was kept so. BF16
    becomes what the device computes in.
    """
    elements: dict[torch.dtype, int] = {}
    for layer in layers:
        if layer.kind != "other" and layer.dtype in FLOATS:
            elements[layer.dtype] = elements.get(layer.dtype, 0) + layer.elements
    if not elements:
        wide = any(layer.dtype is torch.float64 for layer in layers)
        return torch.float32 if wide else target.arch.compute
    text = config.get("text_config")
    parts = (config, text if isinstance(text, Mapping) else {})
    named = [str(part.get(key)).removeprefix("torch.") for part in parts for key in ("dtype", "torch_dtype")]
    by_name = {str(dtype).removeprefix("torch."): dtype for dtype in elements}
    most = max(elements, key=lambda d: (elements[d], -d.itemsize))
    dtype = next((by_name[n] for n in named if n in by_name), most)
    return target.arch.compute if dtype is torch.bfloat16 else dtype


class HeldDtypes:
    """In which dtype a model holds what stays: the one that it computes in, but for what it wants otherwise.

    That is what its class keeps in FP32 (``_keep_in_fp32_modules``, ``_keep_in_fp32_modules_strict``, and
    layers of ``torch.nn`` that it makes in FP32 among 16-bit parameters, such as the router of HunYuan),
    buffers that it makes in a wider dtype, and what a ``factory`` makes in FP32 among 16-bit parameters. Only
    tensors that are stored in more than 16 bits stay so for the last two reasons.

    Args:
        model: On meta.
        dtype: What it computes in.
        factory: Whether a function of the caller made it. Of Transformers' own modules, parameters that are
            made by ``torch.Tensor(...)`` say nothing: see ``build_context``.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, factory: bool = False) -> None:
        self.dtype, self._kept = dtype, kept_in_fp32(model, dtype)
        parameters = {n: p.dtype for n, p in model.named_parameters(remove_duplicate=False)}
        self._made = {name: b.dtype for name, b in model.named_buffers() if b.is_floating_point()}
        self._asked_for: frozenset[str] = frozenset()
        if dtype in HALVES and not set(parameters.values()).isdisjoint(HALVES):
            wide = {name: made for name, made in parameters.items() if made is torch.float32}
            if factory:
                self._made |= wide
            else:
                self._asked_for = frozenset(name for name in wide if _is_of_torch(model, name))

    def of(self, name: str, stored: torch.dtype) -> torch.dtype:
        """Dtype in which the parameter or buffer ``name`` is held that is stored as ``stored``."""
        if stored not in _FLOATING:
            return stored
        if self._kept(name) or name in self._asked_for:
            return torch.float32
        return self.dtype if stored in HALVES else self._made.get(name, self.dtype)

    def in_fp32(self, name: str, stored: torch.dtype) -> bool:
        """Whether that is FP32 in a model that computes in 16 bits."""
        return self.dtype in HALVES and self.of(name, stored) is torch.float32


def _is_of_torch(model: nn.Module, name: str) -> bool:
    """Whether a parameter is that of a layer of torch, which makes it in the default dtype or in the one that
    is asked for.
    """
    return type(model.get_submodule(name.rpartition(".")[0])).__module__.startswith("torch.nn.")


def kept_in_fp32(model: nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    """Which names a model keeps in FP32 while it computes in ``dtype``.

    Transformers says it as regular expressions for each dtype (``_get_dtype_plan``). Diffusers, and everybody
    else, as parts of dotted names in ``_keep_in_fp32_modules``.
    """
    patterns: set[str] = set()
    parts: set[str] = set()
    for module in model.modules() if dtype in HALVES else ():
        planned: Any = getattr(module, "_get_dtype_plan", None)
        if callable(planned):
            kept = (glob for glob, held in planned(dtype).items() if held is torch.float32)
            patterns.update(glob.replace("*", ".*") for glob in kept)
        else:
            for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
                names: Any = getattr(module, attribute, None)
                parts.update(names or ())
    expressions = [re.compile(pattern) for pattern in patterns]
    return lambda name: any(e.search(name) for e in expressions) or not parts.isdisjoint(name.split("."))


def place_tensors(
    layers: Iterable[Layer],
    model: nn.Module,
    names: Mapping[str, str],
    dtypes: HeldDtypes,
    copies: Mapping[str, str],
    quantized: Container[str] = (),
) -> list[Layer]:
    """Says of each layer whether the model has a place for it, and in which dtype it is held if it stays.

    Args:
        layers: Of the checkpoint.
        model: On meta.
        names: For each tensor of the checkpoint its name in the model.
        dtypes: Of the model.
        copies: Stored tensor -> the one of which it is a second copy.
        quantized: Names of layers that are quantized already.

    Returns:
        The layers; those with no place, second copies and what the class keeps in FP32 with that reason.
    """
    places, unused = model.state_dict().keys(), _unused(model)
    out = []
    for layer in layers:
        tensor, expert, *_ = next(part for parts in layer.parts.values() for part in parts)
        name, fused_here = names[tensor], layer.experts and expert is None
        if layer.name in quantized:
            out.append(layer)
            continue
        layer = replace(layer, held_dtype=dtypes.of(name, layer.dtype))
        if tensor in copies:
            text = f"a second copy of {copies[tensor]}, to which it is tied"
            layer = replace(layer, skip_reason=SkipReason(SkipCode.SECOND_COPY, text))
        elif name not in places and not fused_here:
            layer = replace(layer, skip_reason=_no_place(name, model, unused))
        out.append(leave_in_fp32(layer, model, name, dtypes))
    return out


def leave_in_fp32(layer: Layer, model: nn.Module, name: str, dtypes: HeldDtypes) -> Layer:
    """Leaves a layer alone that the model keeps in FP32."""
    if layer.kind == "other" or not layer.loaded or not dtypes.in_fp32(name, layer.dtype):
        return layer
    text = f"{type(model).__name__} keeps it in FP32"
    return replace(layer, skip_reason=SkipReason(SkipCode.KEPT_FP32, text))


def _no_place(name: str, model: nn.Module, unused: Callable[[str], bool]) -> SkipReason:
    path, _, leaf = name.rpartition(".")
    if unused(name):
        return SkipReason(SkipCode.UNUSED, f"{type(model).__name__} has no use for it")
    try:
        kind = type(model.get_submodule(path)).__name__
    except AttributeError:
        return SkipReason(SkipCode.NO_MODULE, "the model has no module of this name")
    return SkipReason(SkipCode.NO_MODULE, f"the {kind} of the model has no {leaf}")


def _unused(model: nn.Module) -> Callable[[str], bool]:
    """Which names of a checkpoint its class knows and has no use for, as Transformers has it."""
    named: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    patterns = list(named or ())
    buffers = [name for name, _ in model.named_buffers()]
    patterns += [p for end, p in _MOVED.items() if any(name.endswith(end) for name in buffers)]
    expressions = [re.compile(pattern) for pattern in patterns]
    return lambda name: any(e.search(name) for e in expressions)
