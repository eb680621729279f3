"""Tells a checkpoint that is quantized already, by its config or by its tensors, and says what to do with it."""

from __future__ import annotations

from quantport.checkpoint import Checkpoint
from quantport.errors import CheckpointError
from quantport.loading.build import read_json

_MARKS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "block-wise FP8",
    ".weight_scale": "compressed-tensors or FP8",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes LLM.int8()",
    "_blocks": "MXFP4",
}


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Refuses a checkpoint that somebody else quantized.

    Raises:
        CheckpointError: names the method that was found.
    """
    method = read_json(checkpoint.directory / "config.json").get("quantization_config", {}).get("quant_method")
    found = f"config.json says quant_method {method!r}" if method else ""
    for name, info in checkpoint.tensors.items():
        mark = next((m for m in _MARKS if name.endswith(m)), None)
        if not found and (mark or "float8" in str(info.dtype)):
            found = f"tensor {name} ({info.dtype}), a mark of {_MARKS[mark] if mark else 'FP8'}"
    if found:
        raise CheckpointError(
            f"quantize {checkpoint.directory}",
            f"it is quantized already: {found}",
            "the 16-bit original of this checkpoint, or load it with the library that made it",
        )
