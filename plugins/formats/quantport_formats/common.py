"""What the formats share: the configuration of a quantizer, and stored tensors as other dtypes and shapes."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from quantport.checkpoint import TensorSource
from quantport.errors import CheckpointError

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def quantizer_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``quantization_config`` of ``config.json``, or of the text model in it; empty where there is none."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        found = part.get("quantization_config")
        if isinstance(found, Mapping):
            return found
    return {}


def quant_method(config: Mapping[str, Any]) -> str:
    """The name of the quantizer, in lower case; empty where none is named."""
    return str(quantizer_config(config).get("quant_method") or "").lower()


def held_dtype(source: TensorSource, config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of what a checkpoint does not quantize: that of ``config.json``, or else that of most of its
    tensors in 16 bits.
    """
    for key in ("dtype", "torch_dtype"):
        named = HALVES.get(str(config.get(key)).removeprefix("torch."))
        if named is not None:
            return named
    dtypes = [info.dtype for info in source.tensors.values()]
    return max((torch.bfloat16, torch.float16), key=dtypes.count)


def need(source: TensorSource, format_name: str, name: str, shape: tuple[int, ...] | None = None) -> Any:
    """What a source says of a tensor.

    Raises:
        CheckpointError: it is absent, or of another shape.
    """
    info = source.tensors.get(name)
    if info is None or (shape is not None and tuple(info.shape) != shape):
        found = "no such tensor" if info is None else f"shape {list(info.shape)}"
        wanted = "the tensor" if shape is None else f"shape {list(shape)}"
        raise CheckpointError(
            f"read {name} of {source.directory} as {format_name}", found, f"{wanted}: the complete checkpoint"
        )
    return info


def activation_order(index: Tensor, group: int) -> Tensor | None:
    """The inputs of a layer by their groups, as a scheme in activation order stores its columns: int32
    ``[k]``; None where a group has too few of them or too many.

    Args:
        index: The group of each input, int64 ``[k]``.
        group: Inputs of a group.
    """
    order = index.argsort(stable=True)
    groups = torch.arange(len(index), dtype=index.dtype, device="cpu") // group
    return order.to(torch.int32) if torch.equal(index[order], groups) else None


def exponents(scale: Tensor) -> Tensor:
    """fp32 values of scales that are stored as e8m0 exponents, as bytes or as ``float8_e8m0fnu``; those of
    other dtypes as they are, in fp32.
    """
    if scale.dtype is torch.uint8 or scale.dtype is torch.float8_e8m0fnu:
        # 2**-127 is no normal number of fp32: its bits are those of a half
        bits = scale.view(torch.uint8).to(torch.int32)
        return torch.where(bits == 0, 1 << 22, bits << 23).view(torch.float32)
    return scale.float()


def without_static_scales(source: TensorSource, coded: Container[str]) -> dict[str, Any]:
    """What `Coded` is told of ``input_scale`` and ``input_zero_point`` beside weights: they are named, not
    used.
    """
    ends = (".input_scale", ".input_zero_point")
    static = [n for n in source.tensors if n.endswith(ends) and f"{n.rpartition('.')[0]}.weight" in coded]
    if not static:
        return {}
    text = f"{len(static)} static scales of activations ({static[0]}, ...) are not used: activations are "
    return {"unlisted": static, "notices": (text + "quantized for each token, as far as the scheme says",)}
