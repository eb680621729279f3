"""The checkpoint that is not quantized: what no other format recognizes, and holds no codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantport.checkpoint.format import CheckpointFormat, Recognized
from quantport.checkpoint.source import StoredTensor, TensorSource
from quantport.errors import CheckpointError
from quantport.model.layers import Layer, find_layers
from quantport.scheme.catalog import Schemes

# as the names of weights end; the last are fused experts
_WEIGHTS = ("weight", ".weight_packed", ".weight_codes", "_proj")
_WRITERS = {
    "_blocks": "MXFP4",
    ".qweight": "GPTQ or AWQ",
    ".weight_codes": "quantport",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "block-wise FP8",
    ".weight_scale": "compressed-tensors or FP8",
    ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes LLM.int8()",
}
_SMALL_INTEGERS = frozenset({torch.int8, torch.uint8, torch.int16, torch.int32})


class PlainFormat(CheckpointFormat):
    """Weights in 16 or 32 bits, named as the modules that hold them."""

    name = "plain"

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """As `CheckpointFormat.recognize`."""
        return None if quantized_by(source, config) else _Plain(self.name, source)


class _Plain(Recognized):
    def layers(self) -> list[Layer]:
        return find_layers(self.source.tensors)


def quantized_by(source: TensorSource, config: Mapping[str, Any]) -> str:
    """What ``config.json`` says of a quantizer, and the first tensor that holds codes; empty where nobody
    quantized a checkpoint.
    """
    (key, method), codes = _method(config), _first_codes(source)
    claim = [f"config.json says {key} {method!r}"] if method else []
    if codes is not None:
        dtype = source.tensors[codes].dtype
        claim.append(f"tensor {codes} ({dtype}), a mark of {_writer(codes, source.tensors)}")
    return "; ".join(claim)


def not_recognized(source: TensorSource, config: Mapping[str, Any]) -> CheckpointError:
    """The error for a checkpoint that somebody quantized in a format that nobody here knows, or whose
    ``config.json`` says so of weights in 16 bits.
    """
    asked, (key, method) = f"quantize {source.directory}", _method(config)
    if _first_codes(source) is None and not any(map(_may_be_codes, source.tensors.values())):
        return CheckpointError(
            asked,
            f"config.json says {key} {method!r}, but no tensor is quantized: its "
            "quantization_config is stale, or says what to do while loading",
            "config.json without quantization_config, if the weights are to be taken as they are",
        )
    return CheckpointError(
        asked,
        f"it is quantized already: {quantized_by(source, config)}",
        "the 16-bit original of this checkpoint, or load it with the library that made it",
    )


def _method(config: Mapping[str, Any]) -> tuple[str, Any]:
    """The key of ``quantization_config`` that names a quantizer, and the name; falsy where nothing does."""
    entry = config.get("quantization_config")
    if not isinstance(entry, Mapping):
        return "quant_method", entry
    return next(
        ((k, entry[k]) for k in ("quant_method", "quantized_by") if entry.get(k)), ("quant_method", None)
    )


def refuse_codes(source: TensorSource, asked: str) -> None:
    """Refuses codes that a format has taken for weights in 16 bits, such as those of a second quantizer.

    Raises:
        CheckpointError: names the first.
    """
    codes = _first_codes(source)
    if codes is not None:
        found = f"{codes} ({source.tensors[codes].dtype}), codes that are part of no weight of this format"
        raise CheckpointError(asked, found, "the complete checkpoint of one quantizer")


def _first_codes(source: TensorSource) -> str | None:
    """The first tensor that holds codes, by its dtype and its place: a name alone is no mark."""
    return next((n for n, info in source.tensors.items() if _holds_codes(n, info, source.tensors)), None)


def _holds_codes(name: str, info: StoredTensor, tensors: Mapping[str, StoredTensor]) -> bool:
    if info.dtype.is_floating_point or info.dtype.is_complex:
        return _is_small_float(info.dtype)
    if name.endswith("_blocks"):
        return f"{name.removesuffix('_blocks')}_scales" in tensors
    return len(info.shape) > 1 and name.endswith(_WEIGHTS)


def _may_be_codes(info: StoredTensor) -> bool:
    """Whether a tensor is a matrix of small integers, as of a format that names its codes in its own way."""
    return info.dtype in _SMALL_INTEGERS and len(info.shape) > 1


def _writer(codes: str, tensors: Mapping[str, StoredTensor]) -> str:
    """Who wrote a tensor of codes, by its name and by what stands beside it."""
    base = codes.removesuffix(".weight")
    for suffix, writer in _WRITERS.items():
        if codes.endswith(suffix) or base + suffix in tensors:
            return writer
    return "FP8" if _is_small_float(tensors[codes].dtype) else "a quantizer whose scales are not known"


def _is_small_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1
