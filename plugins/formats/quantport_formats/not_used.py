"""What of a checkpoint is not used as it was meant: the words of the notices, and the tensors."""

from __future__ import annotations

from collections.abc import Container, Iterator

from quantport.checkpoint import KVCacheConfig, TensorSource
from quantport.scheme import Scheme
from quantport_formats.compressed_tensors_config import Args, Group

_OF_ACTIVATIONS = (
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".output_scale",
    ".output_zero_point",
)
_OF_CACHES = (".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point", ".q_zero_point")


def of_activations(group: Group, scheme: Scheme) -> Iterator[str]:
    """What is not done with activations as a group says."""
    if group.outputs:
        yield f"outputs of the layers of {group.name} are not quantized, as output_activations asks for"
    inputs, ours = group.inputs, scheme.activation
    if inputs is None:
        return
    columns = {"token": 0, "group": inputs.group, "tensor_group": inputs.group}
    columns |= {"tensor": 0} if scheme.static else {}
    asked = inputs.bits, columns.get(inputs.strategy), inputs.static, not inputs.symmetric
    if ours is None or asked != (ours.element.bits, ours.group_size, ours.static, ours.zero_point):
        yield (
            f"activations of the layers of {group.name} are {scheme.activations}, not {_said(inputs)} as "
            f"input_activations asks for"
        )


def _said(inputs: Args) -> str:
    how = "static " * inputs.static + "asymmetric " * (not inputs.symmetric)
    groups = f" of {inputs.group}" * (inputs.group > 0)
    return f"{how}{inputs.kind}{inputs.bits} per {inputs.strategy}{groups}"


def cache_of(asked: Args | None) -> tuple[KVCacheConfig, list[str]]:
    """The KV cache that is asked for, and what is not done of it."""
    if asked is None:
        return KVCacheConfig(), []
    dtype = {("float", 8): "fp8", ("int", 8): "int8", ("int", 4): "int4"}.get((asked.kind, asked.bits))
    if dtype is None:
        return KVCacheConfig(), [f"the KV cache stays in 16 bits: {_said(asked)} is not read here"]
    return KVCacheConfig(dtype), []


def unused(source: TensorSource, used: Container[str]) -> tuple[list[str], list[str]]:
    """Tensors that are no part of the model, and what is said of those that are not used."""
    kinds = {"activations": _OF_ACTIVATIONS, "KV caches": _OF_CACHES}
    names_of, texts = list[str](), list[str]()
    for kind, ends in kinds.items():
        names = [name for name in source.tensors if name.endswith(ends) and name not in used]
        if names:
            texts.append(
                f"{len(names)} stored scales of {kind} ({names[0]}, ...) are not used: they are found while "
                "the model runs"
            )
        names_of += names
    return names_of, texts
