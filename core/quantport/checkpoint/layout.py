"""Which files of a directory make up a checkpoint, in the layouts of Transformers and Diffusers. Reads no
weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NoReturn

from quantport.checkpoint.gguf_header import holds_floats
from quantport.checkpoint.json import read_json
from quantport.checkpoint.limits import MAX_FILES, within
from quantport.errors import CheckpointError

_STEMS = ("model", "diffusion_pytorch_model")
_INDEX = ".safetensors.index.json"
# of files that hold weights, and are no safetensors
OTHER_WEIGHTS = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".npz",
    ".npy",
    ".pkl",
    ".ot",
    ".tflite",
    ".nemo",
)
# of a variant too, which only who names its path reads
_ANY_INDEX = re.compile(r".+\.safetensors\.index(\.[\w-]+)?\.json")
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a checkpoint.

    Attributes:
        directory: Where they lie.
        files: Their paths, sorted.
        index: Tensor name to file name, if there is an index.
        index_file: The path of the index, if there is one.
    """

    directory: Path
    files: tuple[Path, ...]
    index: Mapping[str, str] | None = None
    index_file: Path | None = None


def holds_safetensors(path: Path) -> bool:
    """Whether there are files at a path that no other reader has to be asked about."""
    if not path.is_dir():
        return path.name.endswith(".safetensors") or bool(_ANY_INDEX.fullmatch(path.name))
    try:
        return any(name.endswith((".safetensors", _INDEX)) for name in os.listdir(path))
    except OSError:
        return False  # who opens it says why


def find_layout(path: Path) -> Layout:
    """Finds the files of the checkpoint at a path.

    A single ``model.safetensors`` wins over an index beside it, as in Transformers; so does
    ``diffusion_pytorch_model.safetensors``. Then an index; then whatever safetensors files there are.

    Args:
        path: A directory, one ``.safetensors`` file, or one ``.safetensors.index.json``, also of a variant.

    Raises:
        CheckpointError: Nothing is there, nothing is in safetensors, a shard is absent, or the index is bad.
    """
    if path.is_file():
        return _one_file(path)
    if not path.is_dir():
        _bad(path, "nothing at this path", "the path of a directory with *.safetensors, or of one such file")
    try:
        names = sorted(child.name for child in path.iterdir() if child.is_file())
    except OSError as error:
        _bad(path, str(error), "a directory that you may read", error)
    for stem in _STEMS:
        if f"{stem}.safetensors" in names:
            return Layout(path, (path / f"{stem}.safetensors",))
    indexes = [name for name in names if name.endswith(_INDEX)]
    chosen = next((f"{stem}{_INDEX}" for stem in _STEMS if f"{stem}{_INDEX}" in indexes), None)
    if chosen is None and len(indexes) > 1:
        _bad(path, f"several indexes: {', '.join(indexes)}", "pass the path of one of them")
    if indexes:
        return indexed_layout(path / (chosen or indexes[0]))
    shards = [name for name in names if name.endswith(".safetensors")]
    if not shards:
        _no_safetensors(path, names)
    _check_count(path, shards)
    return Layout(path, tuple(path / name for name in shards))


def _one_file(path: Path) -> Layout:
    if _ANY_INDEX.fullmatch(path.name):
        return indexed_layout(path)
    if path.suffix != ".safetensors":
        _no_safetensors(path, [path.name])
    return Layout(path.parent, (path,))


def indexed_layout(index_file: Path) -> Layout:
    """Reads an index and checks that each shard it names is a file of this directory."""
    weight_map = _weight_map(index_file)
    shards = sorted(set(weight_map.values()))
    within(f"open the checkpoint {index_file}", "files named by the index", len(shards), MAX_FILES)
    for shard in shards:
        windows = PureWindowsPath(shard)
        if (
            not shard
            or "\0" in shard
            or windows.anchor
            or PurePosixPath(shard).is_absolute()
            or ".." in windows.parts
        ):
            _bad(
                index_file,
                f"the file name {shard!r}, which leads out of the directory",
                "names of files beside the index",
            )
    directory = index_file.parent
    absent = [shard for shard in shards if not (directory / shard).is_file()]
    if absent:
        found = f"{len(absent)} of {len(shards)} files that the index names are absent: {some(absent)}"
        _bad(index_file, found, "download the absent files into this directory")
    return Layout(directory, tuple(directory / shard for shard in shards), weight_map, index_file)


def _weight_map(index_file: Path) -> dict[str, str]:
    """Reads the ``weight_map`` of an index: tensor name to file name."""
    suggestion = 'a JSON object {"weight_map": {tensor name: file name}}: download the index again'
    index = read_json(index_file, f"open the checkpoint {index_file}", suggestion)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _bad(index_file, "no weight_map, or an empty one", suggestion)
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            _bad(index_file, f"a {type(shard).__name__} as the file of tensor {name!r}", suggestion)
    return weight_map


def _check_count(directory: Path, shards: list[str]) -> None:
    """Without an index, the file names alone say how many shards there must be (``-00001-of-00004``)."""
    groups: dict[tuple[str, int], int] = {}
    for shard in shards:
        match = _SHARD.fullmatch(shard)
        if match:
            key = (match["stem"], int(match["count"]))
            groups[key] = groups.get(key, 0) + 1
    for (stem, count), there in groups.items():
        if there != count:
            found = f"{there} of the {count} shards of {stem}, and no {stem}{_INDEX}"
            _bad(directory, found, "download the absent shards and the index into this directory")


def _no_safetensors(path: Path, names: list[str]) -> NoReturn:
    """Raises the error for a place that holds no safetensors file, with what to do about what it does
    hold.
    """
    others = [name for name in names if name.endswith(OTHER_WEIGHTS)]
    inner = sorted(p.parent.name for p in path.glob("*/*.safetensors")) if path.is_dir() else []
    inner = list(dict.fromkeys(inner))
    gguf = next((name for name in others if name.endswith(".gguf")), None)
    if gguf is not None:
        suggestion = _instead_of_gguf(path if path.is_file() else path / gguf)
    elif others:
        suggestion = (
            "convert it once: AutoModel.from_pretrained(path).save_pretrained(new_path) writes safetensors"
        )
    elif inner:
        suggestion = f"open one of its parts: {some([str(path / name) for name in inner])}"
    else:
        suggestion = "the path of a directory with *.safetensors, or of one such file"
    found = f"no .safetensors file, only {some(others)}" if others else "no .safetensors file"
    _bad(path, found, suggestion)


def _instead_of_gguf(file: Path) -> str:
    """What to do about a GGUF file, which may hold floats or codes."""
    original = "the original BF16/FP16 checkpoint in safetensors"
    floats = holds_floats(file)
    if floats is None:
        return f"{original}; {file.name} has no header that can be read"
    if not floats:
        return f"{original}; {file.name} is quantized already"
    load = f"AutoModelForCausalLM.from_pretrained(directory, gguf_file={file.name!r}, dtype='auto')"
    return f"{original}, or convert {file.name}, whose weights are not quantized: {load}.save_pretrained(new)"


def some(names: list[str], limit: int = 5) -> str:
    """Joins the first few names, and says how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _bad(path: Path, found: str, suggestion: str, cause: BaseException | None = None) -> NoReturn:
    raise CheckpointError(f"open the checkpoint {path}", found, suggestion) from cause
