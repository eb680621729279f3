"""Binds planned layers to the modules of a model: what stands at a layer's name decides whether it can be
quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from quantport.errors import CheckpointError
from quantport.kernels.base import Kernel, WeightSpec
from quantport.loading.carry_over import carry_over, count_quantized, why_not_replaced
from quantport.model.fused_projections import with_cuts
from quantport.model.layers import CONVOLUTION, Layer, uneven, with_role
from quantport.model.roles import Role, SkipCode, SkipReason
from quantport.model.stored_experts import alternating, flat_experts
from quantport.model.tied_weights import forget_tie, partners, why_not_embedding
from quantport.model.weight_reads import find_weight_reads
from quantport.modules import (
    ExpertForm,
    QuantEmbedding,
    QuantExperts,
    QuantFused,
    QuantLinear,
    QuantModule,
    TiedLinear,
    expert_form,
)
from quantport.modules.expert_form import FLAT_WEIGHTS, holds_transposed
from quantport.planning.steps import Step
from quantport.plugins.registry import Registry

ModulePath = Callable[[Layer], str]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class _Model(NamedTuple):
    """A model, and what is known of its modules as a whole."""

    root: nn.Module
    ties: Mapping[str, tuple[str, ...]]
    heads: Mapping[nn.Module, Role]
    weight_reads: Mapping[nn.Module, str]


def match_modules(layers: Iterable[Layer], model: nn.Module, module_path: ModulePath) -> list[Layer]:
    """Marks the layers that the model does not hold as plain linear layers or experts, with the reason.

    Experts that are separate modules become separate layers.
    """
    layers = _flat_experts(layers, model, module_path)
    _even(layers, model, module_path)
    known = _Model(model, partners(model), _heads(model), find_weight_reads(model))
    config: Any = getattr(model, "config", None)
    described = config.to_dict() if hasattr(config, "to_dict") else {}
    checked = [x for layer in layers for x in _check(layer, known, module_path)]
    heads = {name for layer in checked for name in layer.tied}
    # second copies: the embedding answers to their names too
    named = (replace(x, name=f"{x.name}.weight", kind="other") if x.name in heads else x for x in checked)
    return [with_cuts(layer, described) for layer in named]


def _heads(model: nn.Module) -> dict[nn.Module, Role]:
    """The linear layers at the end of a Transformers model, whatever they are called: the output head, and
    those of all that stands beside the base model and has no blocks.
    """
    base = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
    ends = [child for child in model.children() if child is not base] if isinstance(base, nn.Module) else []
    heads: dict[nn.Module, Role] = {
        module: Role.CLASSIFIER
        for end in ends
        if not any(isinstance(module, nn.ModuleList) for module in end.modules())
        for module in end.modules()
        if type(module) is nn.Linear
    }
    find = getattr(model, "get_output_embeddings", None)
    try:
        head = find() if find else None
    except (AttributeError, NotImplementedError):  # Transformers: the class has none
        head = None
    return heads | {head: Role.HEAD} if type(head) is nn.Linear else heads


def _check(layer: Layer, model: _Model, module_path: ModulePath) -> Iterable[Layer]:
    if not layer.loaded:
        yield layer
        return
    path = module_path(layer)
    module = module_at(model.root, path)
    if layer.kind == "moe" and isinstance(module, nn.ModuleList):
        for single in _separate(layer):
            yield from _check(single, model, module_path)
        return
    layer = _in_model(layer, model, module)
    is_table = layer.role is Role.EMBEDDING and layer.opt_in
    tied = model.ties.get(path, ()) if is_table else ()
    skip = layer.skip_reason or _why_not(layer, module, path)
    if is_table and module is not None:
        heads = [model.root.get_submodule(p) for p in tied]
        hooked = next(filter(None, map(why_not_replaced, (module, *heads))), None)
        skip = why_not_embedding(module, heads) or hooked or skip
    elif layer.kind != "other" and path in model.ties:
        skip = SkipReason(SkipCode.TIED, "its weight is tied to another module's: left in 16 bits")
    if module is not None and (skip is None or (layer.opt_in and skip is layer.skip_reason)):
        _fits(layer, module)
        if reader := model.weight_reads.get(module):
            text = f"{reader} reads its weight, rather than calling it: left in 16 bits"
            skip = SkipReason(SkipCode.WEIGHT_READ, text)
    changed = skip is not layer.skip_reason or tied != layer.tied
    yield replace(layer, skip_reason=skip, tied=tied) if changed else layer


def _in_model(layer: Layer, model: _Model, module: nn.Module | None) -> Layer:
    """The layer in the role that its module has in the model, whatever it is called."""
    if module is None:
        return layer
    if layer.kind == "other":
        return replace(layer, skip_reason=_why_other(layer, module))
    if layer.experts:
        form = expert_form(module)
        return alternating(layer) if isinstance(form, ExpertForm) and form.interleaved else layer
    if layer.kind == "linear" and not layer.skip_reason and type(module) is nn.Embedding:
        return with_role(layer, Role.EMBEDDING)
    if module in model.heads and layer.role is not Role.ROUTER:
        return with_role(layer, model.heads[module])
    if layer.role is Role.EMBEDDING and layer.opt_in and type(module) is nn.Linear:
        return with_role(layer, Role.LINEAR)  # as the ``x_embedder`` of diffusion transformers
    return layer


def _why_other(layer: Layer, module: nn.Module) -> SkipReason | None:
    """Why what is not the weight of a linear layer stays, as the module says that it belongs to."""
    name, skip = type(module).__name__, layer.skip_reason
    if layer.skipped_as(SkipCode.UNEVEN_EXPERTS):
        form = expert_form(module)
        return SkipReason(SkipCode.OTHER_EXPERTS, form) if isinstance(form, str) else skip
    if isinstance(module, _CONVOLUTIONS):
        return CONVOLUTION if layer.is_matrix else skip
    if layer.is_matrix and not layer.skipped_as(SkipCode.SECOND_COPY):
        return SkipReason(
            SkipCode.OTHER_PARAMETER, f"its module is a {name}, no linear layer: left in 16 bits"
        )
    return skip


def _flat_experts(layers: Iterable[Layer], model: nn.Module, module_path: ModulePath) -> list[Layer]:
    """Groups experts that lie one below the other in one matrix for each projection, as modules say."""
    out, grouped = list[Layer](), dict[str, dict[str, Layer]]()
    for layer in layers:
        leaf = layer.name.rpartition(".")[2]
        if layer.kind == "other" and leaf in FLAT_WEIGHTS:
            grouped.setdefault(module_path(layer).removesuffix(".mlp"), {})[leaf] = layer
        out.append(layer)
    for path, parts in grouped.items():
        module: Any = module_at(model, path)
        form = expert_form(module) if module is not None and set(parts) == set(FLAT_WEIGHTS) else ""
        if isinstance(form, ExpertForm) and form.flat:
            by_projection = {FLAT_WEIGHTS[leaf]: part for leaf, part in parts.items()}
            if experts := flat_experts(by_projection, module.num_experts):
                out[out.index(parts["w1"])] = experts
                out = [layer for layer in out if layer not in parts.values()]
    return out


def _even(layers: Sequence[Layer], model: nn.Module, module_path: ModulePath) -> None:
    """Refuses single experts that cannot be fused as the model wants them, since one is absent or of another
    shape.

    Raises:
        CheckpointError: names the first.
    """
    lost = [
        layer for layer in layers if layer.kind == "linear" and module_at(model, module_path(layer)) is None
    ]
    for base, found in uneven(lost).items():
        first = next(layer for layer in lost if layer.name.startswith(f"{base}."))
        path = module_path(first).removesuffix(first.name.removeprefix(base))
        if hasattr(module_at(model, path), "gate_up_proj"):
            suggestion = "a checkpoint with gate, up and down of every expert, from 0 on, in equal shapes"
            raise CheckpointError(f"load the experts {base}", found, suggestion)


def _separate(layer: Layer) -> Iterable[Layer]:
    for e in range(layer.experts):
        for projection, n, k in layer.weights:
            part = layer.parts[projection][e]
            name = part.tensor.removesuffix(".weight")
            weights = (("weight", n, k),)
            yield Layer(
                name,
                "moe",
                weights,
                layer.dtype,
                parts={"weight": (part,)},
                role=layer.role,
                skip_reason=layer.skip_reason,
                group=layer.name,
            )


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, or None; ``get_submodule`` takes several times as long."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)
    return module


def _why_not(layer: Layer, module: nn.Module | None, path: str) -> SkipReason | None:
    """Why what stands at the path of a layer cannot be replaced, or None."""
    if layer.kind == "other":
        return None
    if not path:
        text = "it is the whole model: put it into a module to replace it there"
        return SkipReason(SkipCode.WHOLE_MODEL, text)
    if module is None:
        return SkipReason(SkipCode.NO_MODULE, "the model has no module of this name")
    if isinstance(module, QuantModule):
        return SkipReason(SkipCode.QUANTIZED_ALREADY, "it is quantized already")
    if layer.kind == "moe" and layer.experts:
        form = expert_form(module)
        return SkipReason(SkipCode.OTHER_EXPERTS, form) if isinstance(form, str) else why_not_replaced(module)
    if type(module) is nn.Linear:
        return why_not_replaced(module)
    text = f"its module is a {type(module).__name__}, not a plain torch.nn.Linear"
    return SkipReason(SkipCode.OTHER_LINEAR, text)


def _fits(layer: Layer, module: nn.Module) -> None:
    """Refuses a weight of another shape than the module that takes it.

    Raises:
        CheckpointError: names the layer.
    """
    shapes = {name: (n, k) for name, n, k in layer.weights}
    if layer.experts:
        (i, h), e = shapes["gate_proj"], layer.experts
        found: dict[str, tuple[int, ...]] = {"gate_up_proj": (e, 2 * i, h), "down_proj": (e, h, i)}
        form = expert_form(module)
        if isinstance(form, ExpertForm) and form.flat:
            found = {f"mlp.{name}": (e * i, h) for name in FLAT_WEIGHTS}
        elif holds_transposed(module, i, h):
            found = {name: (e, k, n) for name, (e, n, k) in found.items()}
    else:
        rows, (_, k) = sum(n for n, _ in shapes.values()), next(iter(shapes.values()))
        found = {"weight": (rows, k)}  # of all projections of a fused layer
    for name, shape in found.items():
        expected = tuple(module.get_parameter(name).shape)
        if shape != expected:
            raise CheckpointError(
                f"load {layer.name}.{name} into {type(module).__name__}",
                f"shape {list(shape)} in the checkpoint",
                f"shape {list(expected)}: a checkpoint and a model of the same sizes",
            )


def by_module(steps: Iterable[Step], module_path: ModulePath) -> dict[str, list[Step]]:
    """The steps with a kernel by the path of the module that they fill: one step for most, the pieces of some
    experts.
    """
    out: dict[str, list[Step]] = {}
    for step in steps:
        if step.choice:
            out.setdefault(module_path(step.layer), []).append(step)
    return out


def make_module(steps: Sequence[Step], old: nn.Module, dtype: torch.dtype, registry: Registry) -> QuantModule:
    """Makes the empty quantized module for a layer, or for its pieces, with the bias of the module that it
    stands for.
    """
    bound = {s.layer.name: (_kernel(s, registry), registry.schemes[s.scheme]) for s in steps}
    most = max(steps, key=lambda s: s.layer.elements)
    kernel, scheme = bound[most.layer.name]
    specs = {name: WeightSpec(scheme, n, k) for s in steps for name, n, k in s.layer.weights}
    if most.layer.role is Role.EMBEDDING:
        return QuantEmbedding(
            kernel,
            next(iter(specs.values())),
            dtype,
            most.layer.tied,
            getattr(old, "padding_idx", None),
            registry,
        )
    if not most.layer.experts:
        bias = old._parameters.get("bias")
        return (
            QuantFused(kernel, specs, bias, dtype, registry)
            if len(specs) > 1
            else QuantLinear(kernel, specs.popitem()[1], bias, dtype, registry)
        )
    form = expert_form(old)
    assert isinstance(form, ExpertForm)  # the layer has a reason to stay otherwise
    others = {w: bound[s.layer.name] for s in steps if s is not most for w, _, _ in s.layer.each}
    return QuantExperts(
        kernel,
        specs["gate_proj"],
        specs["down_proj"],
        most.layer.experts,
        form,
        dtype,
        others,
        registry,
        [old.get_parameter(name) for name in form.biases],
    )


def _kernel(step: Step, registry: Registry) -> Kernel:
    assert step.choice is not None  # only steps with a kernel come here
    return registry.kernel(step.choice.kernel)


def swap_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Puts modules where others stood, under every name that those have, with what was hung onto them; output
    heads that are tied to them follow.
    """
    new = dict(new)
    _add_heads(model, new)
    for path, module in new.items():
        carry_over(model.get_submodule(path), module, path)
    by_id = {id(module_at(model, path)): module for path, module in new.items()}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in by_id:
            parent, _, name = path.rpartition(".")
            setattr(module_at(model, parent), name, by_id[id(module)].train(model.training))
    count_quantized(model)


def _add_heads(model: nn.Module, new: dict[str, nn.Module]) -> None:
    """Adds the output heads of quantized embeddings to the modules to put, and tells the model that nothing
    is left to tie.
    """
    for module in list(new.values()):
        if isinstance(module, QuantEmbedding):
            for name in module.tied:
                new[name] = TiedLinear(module, model.get_submodule(name)._parameters.get("bias"))
                forget_tie(model, f"{name}.weight")
