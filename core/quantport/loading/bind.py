"""Binds planned layers to the modules of a model: what stands at a layer's name decides whether it can be quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import nn

from quantport.host import host
from quantport.kernel import WeightSpec
from quantport.layers import Layer
from quantport.modules import QuantExperts, QuantLinear, QuantModule, activation_name, why_not_experts
from quantport.plan import Step

Place = Callable[[Layer], str]


def check(layers: Iterable[Layer], model: nn.Module, place: Place) -> list[Layer]:
    """Marks the layers that the model does not hold as plain linear layers or experts, with the reason.

    Experts that are separate modules become separate layers.
    """
    out: list[Layer] = []
    for layer in layers:
        if layer.kind == "moe" and isinstance(_module(model, place(layer)), nn.ModuleList):
            out += check(_separate(layer), model, place)
        else:
            keep = layer.keep or _why_not(layer, _module(model, place(layer)))
            if "output head" in keep and _tied(model):
                keep = "tied to the embedding: left in 16 bits"
            out.append(replace(layer, keep=keep))
    return out


def _tied(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def _separate(layer: Layer) -> Iterable[Layer]:
    for e in range(layer.experts):
        for projection, n, k in layer.weights:
            part = layer.parts[projection][e]
            name = part.tensor.removesuffix(".weight")
            yield Layer(name, "moe", (("weight", n, k),), layer.dtype, parts={"weight": (part,)}, keep=layer.keep)


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _why_not(layer: Layer, module: nn.Module | None) -> str:
    if layer.kind == "other":
        return ""
    if module is None:
        return "the model has no module of this name"
    if isinstance(module, QuantModule):
        return "it is quantized already"
    if layer.kind == "moe" and layer.experts:
        if not all(hasattr(module, p) for p in ("gate_up_proj", "down_proj")):
            return f"its experts are a {type(module).__name__}, without gate_up_proj and down_proj"
        return why_not_experts(module)
    return "" if type(module) is nn.Linear else f"its module is a {type(module).__name__}, not a plain torch.nn.Linear"


def make_module(step: Step, old: nn.Module) -> QuantModule:
    """Makes the empty quantized module for a step, with the bias of the module that it stands for."""
    assert step.choice is not None  # only steps with a kernel come here
    kernel, scheme = host().kernel(step.choice.kernel), host().schemes[step.scheme]
    specs = {name: WeightSpec(scheme, n, k) for name, n, k in step.layer.weights}
    if step.layer.experts:
        activation = activation_name(old)
        assert activation is not None  # why_not_experts refused it otherwise
        return QuantExperts(kernel, specs["gate_proj"], specs["down_proj"], step.layer.experts, activation)
    return QuantLinear(kernel, next(iter(specs.values())), old._parameters.get("bias"))


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module where another stood."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module.train(model.training))
