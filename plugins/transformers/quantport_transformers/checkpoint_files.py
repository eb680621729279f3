"""The files that Transformers has chosen, as the one path that quantport opens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from quantport.engine import CheckpointError

# which are also those that quantport finds in a directory first
_USUAL = ("model.safetensors", "model.safetensors.index.json")


def one_path(files: Sequence[str] | None) -> Path:
    """The directory, where it is what quantport finds there; or else the file, or the index of the files.

    Args:
        files: Paths of files of one directory: of one revision, variant and kind.

    Raises:
        CheckpointError: there are none, or no index names them all.
    """
    if not files:
        raise CheckpointError(
            "quantize a model while it loads",
            "no files: from_pretrained was given a state_dict",
            "the path or the id of a checkpoint; quantport.quantize_ for a model in memory",
        )
    directory, names = Path(files[0]).parent, {Path(file).name for file in files}
    chosen = Path(files[0]) if len(files) == 1 else _index_of(directory, names)
    return directory if chosen.name in _USUAL else chosen


def _index_of(directory: Path, names: set[str]) -> Path:
    for index in sorted(directory.glob("*.index*.json")):
        shards = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()
        if set(shards) == names:
            return index
    found = f"{len(names)} files, and no index that names them"
    raise CheckpointError(f"load {directory}", found, "the complete checkpoint, as it was saved")
