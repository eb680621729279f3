"""Experts whose names or order in a checkpoint only the model knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from quantport.model.layers import (
    FUSED_EXPERTS,
    PROJECTIONS,
    Layer,
    Part,
    TensorLike,
    find_layers,
    in_order,
)
from quantport.model.roles import Role


def find_renamed_experts(
    layers: Sequence[Layer], names: Mapping[str, str], tensors: Mapping[str, TensorLike]
) -> list[Layer]:
    """Groups fused experts that only the names in the model show: Granite stores them as
    ``input_linear.weight`` and ``output_linear.weight``.

    Args:
        layers: From ``find_layers``.
        names: For each tensor of the checkpoint its name in the model.
        tensors: Those of the checkpoint.

    Returns:
        The layers in checkpoint order, such experts under their name in the model.
    """
    stored = {
        names[layer.name]: layer.name
        for layer in layers
        if layer.kind == "other"
        and layer.name in names
        and not FUSED_EXPERTS.match(layer.name)
        and FUSED_EXPERTS.match(names[layer.name])
    }
    experts = find_layers({name: tensors[tensor] for name, tensor in stored.items()})
    grouped = [
        replace(
            layer,
            name=stored.get(layer.name, layer.name),
            parts={
                weight: tuple(part._replace(tensor=stored[part.tensor]) for part in parts)
                for weight, parts in layer.parts.items()
            },
        )
        for layer in experts
    ]
    replaced = set(stored.values())
    return in_order([*(x for x in layers if x.name not in replaced), *grouped], tensors)


def alternating(layer: Layer) -> Layer:
    """Fused experts in whose ``gate_up_proj`` the rows of gate and up take turns, gate first."""
    stop = 2 * layer.weights[0][1]
    parts = {
        name: tuple(part._replace(start=first, stop=stop, step=2) for part in layer.parts[name])
        for first, name in enumerate(PROJECTIONS[:2])
        if layer.parts[name][0].expert is not None
    }
    return replace(layer, parts={**layer.parts, **parts})


def flat_experts(projections: Mapping[str, Layer], experts: int) -> Layer | None:
    """One layer of experts that lie one below the other in one matrix ``[experts * intermediate, hidden]``
    for each projection, down as its transpose; None where these are none of equal shape and dtype.

    Args:
        projections: What holds gate, up and down.
        experts: Their number.
    """
    first = projections[PROJECTIONS[0]]
    (_, rows, hidden), (part, *_) = first.weights[0], next(iter(first.parts.values()))
    alike = {(layer.weights[0][1:], layer.dtype) for layer in projections.values()}
    if len(alike) > 1 or experts < 1 or rows % experts:
        return None
    n = rows // experts
    shapes = {"gate_proj": (n, hidden), "up_proj": (n, hidden), "down_proj": (hidden, n)}
    names = {name: next(iter(layer.parts.values()))[0].tensor for name, layer in projections.items()}
    return Layer(
        part.tensor.rpartition(".mlp.")[0],
        "moe",
        tuple((name, *shapes[name]) for name in PROJECTIONS),
        first.dtype,
        experts,
        {
            name: tuple(
                Part(names[name], e, transposed=name == PROJECTIONS[2], experts=experts)
                for e in range(experts)
            )
            for name in PROJECTIONS
        },
        Role.EXPERTS,
    )
