"""Checkpoints of compressed-tensors, which llm-compressor writes: codes of 2 to 8 bits with scales for
tensors, rows, groups or blocks, zero points, and the small floats of MX and NVFP4.

Source: compressed-tensors 0.20: ``compressors/*/base.py``, ``quantization/lifecycle/initialize.py`` for the
shapes of scales. Values are those that ``decompress`` gives where it computes in fp32; the scales are stored
in the dtype of the model, and the library rounds to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from quantport.checkpoint import (
    CheckpointFormat,
    Coded,
    CodedTensor,
    Fill,
    KVCacheConfig,
    Recognized,
    SavedModel,
    SaveTarget,
    Stream,
    TensorLayout,
    TensorSource,
)
from quantport.model.patterns import bounded
from quantport.scheme import Scheme
from quantport.scheme.catalog import Schemes
from quantport_formats.common import held_dtype, quant_method, quantizer_config
from quantport_formats.compressed_tensors_config import Args, Group, Groups
from quantport_formats.compressed_tensors_weights import Weights
from quantport_formats.compressed_tensors_write import write

_CODES = (torch.int8, torch.float8_e4m3fn)
_OF_WEIGHTS = (
    ".weight_scale",
    ".weight_zero_point",
    ".weight_g_idx",
    ".weight_shape",
    ".weight_global_scale",
)
_OF_ACTIVATIONS = (
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".output_scale",
    ".output_zero_point",
)
_OF_CACHES = (".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point", ".q_zero_point")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embeddings")


class CompressedTensors(CheckpointFormat):
    """``quant_method: compressed-tensors`` over tensors that hold codes."""

    name = "compressed-tensors"

    def write(
        self, model: SavedModel, tensors: Stream | Fill, layout: TensorLayout | None, to: SaveTarget
    ) -> Path:
        """As `CheckpointFormat.write`, of the schemes that this format has."""
        return write(model, tensors, layout, to)

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """As `CheckpointFormat.recognize`."""
        modules = list(_modules(source))
        if quant_method(config) != self.name or not modules:
            return None
        groups = Groups(quantizer_config(config), f"read {source.directory} as {self.name}")
        weights = Weights(self.name, source, schemes, held_dtype(source, config))
        coded: dict[str, CodedTensor] = {}
        notices: dict[str, None] = {}
        with bounded():
            for module in modules:
                group = groups.of(module, module.rpartition(".")[2] in _EMBEDDINGS)
                weight = coded[f"{module}.weight"] = weights.read(module, group)
                notices |= dict.fromkeys(_of_activations(group, weight.scheme))
        notices |= dict.fromkeys(weights.notices)
        self._check_all_used(source, coded, groups)
        cache, more = _cache(groups.cache)
        unused, texts = _unused(source)
        return Coded(
            self.name, source, coded, unlisted=unused, kv_cache=cache, notices=[*notices, *more, *texts]
        )

    def _check_all_used(self, source: TensorSource, coded: Mapping[str, CodedTensor], groups: Groups) -> None:
        used = {name for weight in coded.values() for name in weight.tensors}
        for name in source.tensors:
            twice = name in coded and name not in used
            if twice or (name.endswith(_OF_WEIGHTS) and name not in used):
                raise groups.wrong(
                    f"{name}, which belongs to no weight that is stored as codes",
                    "the complete checkpoint, with quantization_config as it was saved",
                )


def _modules(source: TensorSource) -> Iterator[str]:
    for name, info in source.tensors.items():
        if name.endswith(".weight_packed"):
            yield name.removesuffix(".weight_packed")
        elif name.endswith(".weight") and info.dtype in _CODES:
            yield name.removesuffix(".weight")


def _of_activations(group: Group, scheme: Scheme) -> Iterator[str]:
    """What is not done with activations as a group says."""
    if group.outputs:
        yield f"outputs of the layers of {group.name} are not quantized, as output_activations asks for"
    inputs, ours = group.inputs, scheme.activation
    if inputs is None:
        return
    columns = {"token": 0, "group": inputs.group, "tensor_group": inputs.group}.get(inputs.strategy)
    same = ours is not None and ours.element.bits == inputs.bits and ours.group_size == columns
    if not same or inputs.static or not inputs.symmetric:
        yield (
            f"activations of the layers of {group.name} are {scheme.activations}, not {_said(inputs)} as "
            f"input_activations asks for"
        )


def _said(inputs: Args) -> str:
    how = "static " * inputs.static + "asymmetric " * (not inputs.symmetric)
    groups = f" of {inputs.group}" * (inputs.group > 0)
    return f"{how}{inputs.kind}{inputs.bits} per {inputs.strategy}{groups}"


def _cache(asked: Args | None) -> tuple[KVCacheConfig, list[str]]:
    """The KV cache that is asked for, and what is not done of it."""
    if asked is None:
        return KVCacheConfig(), []
    dtype = {("float", 8): "fp8", ("int", 8): "int8", ("int", 4): "int4"}.get((asked.kind, asked.bits))
    if dtype is None:
        return KVCacheConfig(), [f"the KV cache stays in 16 bits: {_said(asked)} is not read here"]
    return KVCacheConfig(dtype), []


def _unused(source: TensorSource) -> tuple[list[str], list[str]]:
    """Tensors that are no part of the model, and what is said of them."""
    kinds = {"activations": _OF_ACTIVATIONS, "KV caches": _OF_CACHES}
    unused, texts = list[str](), list[str]()
    for kind, ends in kinds.items():
        names = [name for name in source.tensors if name.endswith(ends)]
        if names:
            texts.append(
                f"{len(names)} stored scales of {kind} ({names[0]}, ...) are not used: they are found while "
                "the model runs"
            )
        unused += names
    return unused, texts
