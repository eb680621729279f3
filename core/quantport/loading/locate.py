"""Where a checkpoint is, and whether it can be quantized: by whom it was quantized already, if it was."""

from __future__ import annotations

import os
from pathlib import Path

from quantport.checkpoint import Checkpoint
from quantport.errors import CheckpointError
from quantport.loading.skeleton import read_json

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
    if (checkpoint.directory / "quantport.json").is_file():
        suggestion = "quantport.load or `quantport run`, without a scheme"
        raise CheckpointError(
            f"quantize {checkpoint.directory}", "quantport quantized it already", suggestion
        )
    entry = read_json(checkpoint.directory / "config.json").get("quantization_config")
    method = entry.get("quant_method") if isinstance(entry, dict) else entry
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


def locate(source: str | os.PathLike[str]) -> Path:
    """A local path, or a snapshot of a model of the hub."""
    if not isinstance(source, str | os.PathLike):
        raise CheckpointError(
            f"open the checkpoint {source!r}",
            f"a {type(source).__name__}",
            "a path, or a model id of the hub",
        )
    path = Path(source)
    text = str(source)
    if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        return path.expanduser()
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return path
    try:
        return Path(
            snapshot_download(text, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"])
        )
    except Exception as error:  # the hub's many errors: network, name, permission
        raise CheckpointError(
            f"load {text!r}",
            f"no such directory, and the hub says: {type(error).__name__}: {str(error).splitlines()[0]}",
            "a local checkpoint directory, or a model id that the hub has and that can be reached",
        ) from error
