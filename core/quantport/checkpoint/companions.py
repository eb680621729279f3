"""The files beside the weights of a model: tokenizer, processors, remote code, licence, whatever is there."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from quantport.checkpoint.layout import OTHER_WEIGHTS

# what a checkpoint says of its own weights, which are not those that are saved
_OF_WEIGHTS = (
    "config.json",
    "quantport.json",
    "adapter_config.json",
    "*.index*.json",
    "*quant*.json",
    "recipe.yaml",
    "*.safetensors",
    *(f"*{suffix}" for suffix in OTHER_WEIGHTS),
)


def companions(directory: Path) -> dict[str, Path]:
    """Every file of a model that neither is a weight nor describes weights.

    Hidden files are left out, folders in folders, and folders with weights: those are other models. A link
    that leaves the directory is not followed, with a warning; but those of a snapshot of the hub lead to the
    blobs beside it.

    Args:
        directory: Of the checkpoint that a model came from.

    Returns:
        Name in the directory, with slashes -> what to read.
    """
    root = directory.resolve()
    roots = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    return dict(_files(directory, roots, inside=""))


def _files(folder: Path, roots: list[Path], inside: str) -> Iterator[tuple[str, Path]]:
    children = [
        child for child in sorted(folder.iterdir()) if not child.name.startswith((".", "__pycache__"))
    ]
    if inside and any(child.name.endswith((".safetensors", *OTHER_WEIGHTS)) for child in children):
        return
    for child in children:
        if any(fnmatch(child.name, pattern) for pattern in _OF_WEIGHTS):
            continue
        target = Path(os.path.realpath(child))  # where links go in circles, that name
        if child.is_symlink() and not (target.is_file() and any(map(target.is_relative_to, roots))):
            warnings.warn(f"not copied: {child}, a link to {target}", UserWarning, stacklevel=5)
        elif target.is_file():
            yield f"{inside}{child.name}", target
        elif target.is_dir() and not inside:
            yield from _files(child, roots, inside=f"{child.name}/")
