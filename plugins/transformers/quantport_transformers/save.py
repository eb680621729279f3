"""``save_pretrained`` of a quantized model: a format that Transformers itself loads, where one holds it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import create_repo

import quantport
from quantport.engine import SavedModel, SaveError, described_model, parse_size, why_not_written

OWN = "quantport"
# from the most general; each as Transformers 5.23 reads it
_FORMATS = ("compressed-tensors", "fp8", "mxfp8")
# further arguments of save_pretrained, and the value that a quantized model is written with
_ONLY = {
    "state_dict": None,
    "variant": None,
    "safe_serialization": True,
    "save_peft_format": True,
    "save_original_format": True,
    "distributed_checkpoint": False,
}
_WEIGHTS = (".safetensors", ".bin", ".index.json")


def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    token: str | bool | None = None,
    **options: Any,
) -> None:
    """Writes a quantized model; arguments as of ``PreTrainedModel.save_pretrained``.

    Files that lie in the directory stay, but for weights and configurations of a model.

    Raises:
        SaveError: an argument that has no meaning for a quantized model; or as ``quantport.save``.
    """
    hub = {name: options.pop(name) for name in ("repo_id", "commit_message", "create_pr") if name in options}
    repository = {name: options.pop(name) for name in ("private", "repo_type") if name in options}
    for name, value in options.items():
        if name not in _ONLY or value != _ONLY[name]:
            found = f"{name}={value!r}, which says how 16-bit weights are written"
            raise SaveError("save_pretrained of a quantized model", found, f"without {name}")
    if not is_main_process:
        return
    directory = Path(save_directory)
    before = model._get_files_timestamps(directory) if directory.is_dir() else {}
    _write(model, directory, parse_size(max_shard_size, "max_shard_size"))
    if push_to_hub:
        name = hub.pop("repo_id", directory.name)
        known = create_repo(name, token=token, exist_ok=True, **repository).repo_id
        model._upload_modified_files(directory, known, before, token=token, **hub)


def _write(model: Any, directory: Path, max_shard_bytes: int) -> None:
    to = _format(described_model(model))
    if not directory.is_dir() or not any(directory.iterdir()):
        quantport.save(model, directory, format=to, max_shard_bytes=max_shard_bytes)
        return
    with TemporaryDirectory(dir=directory, prefix=".save-") as folder:
        written = quantport.save(model, Path(folder) / "model", format=to, max_shard_bytes=max_shard_bytes)
        for old in directory.iterdir():
            if old.name.endswith(_WEIGHTS) and old.name.startswith(("model", "pytorch_model")):
                old.unlink()
        (directory / "quantport.json").unlink(missing_ok=True)
        for file in written.iterdir():
            file.replace(directory / file.name)


def _format(described: SavedModel) -> str:
    """The format that a model is written in; a warning says why it is quantport's own."""
    refused = []
    for name in _FORMATS:
        reason = _not_read(name, described) or why_not_written(described, name)
        if not reason:
            return name
        refused.append(f"not as {name}: {reason}")
    text = f"written as {OWN}, which needs quantport_transformers to be loaded; {'; '.join(refused)}"
    warnings.warn(text, UserWarning, stacklevel=6)
    return OWN


def _not_read(name: str, described: SavedModel) -> str:
    """Why Transformers does not read a model in a format that holds it, or an empty string."""
    experts = [layer for layer in described.layers.values() if layer.experts]
    wide = any(s.weight.element.bits == 8 for layer in experts for s in layer.schemes.values())
    return "Transformers reads no experts of 8 bits in it" if name == _FORMATS[0] and wide else ""
