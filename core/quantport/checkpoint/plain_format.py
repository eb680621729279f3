"""The checkpoint that is not quantized: what no other format recognizes, and bears no mark of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantport.checkpoint.format import CheckpointFormat, Recognized
from quantport.checkpoint.source import TensorSource
from quantport.errors import CheckpointError
from quantport.model.layers import Layer, find_layers
from quantport.scheme.catalog import Schemes

_MARKS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_codes": "quantport",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "block-wise FP8",
    ".weight_scale": "compressed-tensors or FP8",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes LLM.int8()",
    "_blocks": "MXFP4",
}


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
    """By which mark one sees that somebody quantized a checkpoint; empty where nobody did."""
    entry = config.get("quantization_config")
    said = entry if isinstance(entry, Mapping) else {"quant_method": entry}
    for key in ("quant_method", "quantized_by"):
        if said.get(key):
            return f"config.json says {key} {said[key]!r}"
    for name, info in source.tensors.items():
        mark = next((m for m in _MARKS if name.endswith(m)), None)
        if mark or "float8" in str(info.dtype):
            return f"tensor {name} ({info.dtype}), a mark of {_MARKS[mark] if mark else 'FP8'}"
    return ""


def not_recognized(source: TensorSource, config: Mapping[str, Any]) -> CheckpointError:
    """The error for a checkpoint that somebody quantized in a format that nobody here knows."""
    return CheckpointError(
        f"quantize {source.directory}",
        f"it is quantized already: {quantized_by(source, config)}",
        "the 16-bit original of this checkpoint, or load it with the library that made it",
    )
