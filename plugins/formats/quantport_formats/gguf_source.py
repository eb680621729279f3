"""The tensors of GGUF files under the names, and in the order of rows, that they have elsewhere.

Blocks are uint8 ``[n, bytes]``, as they are stored. Rows of q and k that llama.cpp's conversion permuted are
put back, whole rows at a time, and the one that it added to norms of Gemma is taken off.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from quantport.checkpoint import Checkpoint, Rows, StoredTensor, TensorInfo
from quantport.checkpoint.header import Header
from quantport.checkpoint.layout import Layout
from quantport.checkpoint.limits import MAX_EXPERTS, MAX_FILES
from quantport.errors import CheckpointError
from quantport_formats.gguf_header import GgmlType, GgufHeader, GgufTensor, read_header
from quantport_formats.gguf_names import FAMILIES, MIXTRAL, OF_ROPE, Family, Place, place_of

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class Weight:
    """What a tensor is, whatever its bytes look like.

    Attributes:
        shape: Of the numbers.
        kind: Their type.
        heads: Heads whose rows are stored in pairs; 0 where rows are in order.
        plus_one: Whether one was added.
    """

    shape: tuple[int, ...]
    kind: GgmlType
    heads: int = 0
    plus_one: bool = False

    @property
    def is_decoded(self) -> bool:
        """Whether the library decodes it, since no scheme has its numbers."""
        return self.kind.name.startswith(("IQ", "TQ"))


@dataclass(frozen=True)
class _Decoded:
    """What is said of a tensor that is decoded when it is read."""

    shape: tuple[int, ...]
    nbytes: int
    dtype: torch.dtype = torch.bfloat16


def find_files(path: Path) -> tuple[Path, ...]:
    """The GGUF files of a checkpoint, in order; none where a path holds no such files.

    Raises:
        CheckpointError: several models are there, or a file of one is absent.
    """
    asked = f"open the checkpoint {path}"
    if path.is_dir():
        try:
            names = sorted(child for child in path.iterdir() if child.name.endswith(".gguf"))
        except OSError:
            return ()  # who opens it says why
        matches = {child: _SHARD.fullmatch(child.name) for child in names}
        models = {match["stem"] if match else child.name for child, match in matches.items()}
        if len(models) > 1:
            found = f"{len(models)} models in GGUF files: {', '.join(sorted(models)[:5])}"
            raise CheckpointError(asked, found, "the path of one file")
        return find_files(names[0]) if names else ()
    if not path.name.endswith(".gguf") or not path.is_file():
        return ()
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return (path,)
    stem, count = match["stem"], int(match["count"])
    if not 0 < count <= MAX_FILES:
        raise CheckpointError(asked, f"a file of {count}", f"one of at most {MAX_FILES}")
    files = tuple(path.parent / f"{stem}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count))
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        found = f"{len(absent)} of {count} files are absent: {', '.join(absent[:3])}"
        raise CheckpointError(asked, found, "all files of the model in one directory")
    return files


class GgufSource:
    """A `TensorSource` of GGUF files.

    Args:
        files: Of one model, the first with its metadata.
        headers_only: As for `CheckpointFormat.open`.

    Attributes:
        values: Metadata of the first file.
        family: The architecture.
        weights: What each tensor is, by its name.
        rope: Names of tensors with factors of frequencies, which are no part of the model.

    Raises:
        CheckpointError: a file is malformed, its architecture is not known, or has no such tensor.
    """

    mapped = False

    def __init__(self, files: tuple[Path, ...], *, headers_only: bool = False) -> None:
        self.path, self.asked = files[0], f"open the checkpoint {files[0]}"
        headers = {str(file): read_header(file, headers_only=headers_only) for file in files}
        self.values = headers[str(files[0])].values
        self._check_split(len(files))
        self.family = self._family()
        self.weights: dict[str, Weight] = {}
        self.rope: list[str] = []
        infos = {file: self._infos(file, header) for file, header in headers.items()}
        self._raw = Checkpoint(
            Layout(self.path.parent, files),
            {file: Header(MappingProxyType(found), MappingProxyType({})) for file, found in infos.items()},
            {file: header.stamp for file, header in headers.items()},
        )

    def _check_split(self, count: int) -> None:
        said = self.values.get("split.count", count)
        if said not in (0, count):
            found = f"split.count {str(said)[:40]} in the first of {count} files"
            raise CheckpointError(self.asked, found, "all files of one model")

    @property
    def architecture(self) -> str:
        """As GGUF names it."""
        return str(self.values.get("general.architecture"))

    def number(self, key: str) -> int | None:
        """A positive whole number of the metadata of the architecture; None where there is none."""
        found = self.values.get(f"{self.architecture}.{key}")
        return found if type(found) is int and found > 0 else None

    def _family(self) -> Family:
        if self.architecture not in FAMILIES:
            raise CheckpointError(
                self.asked,
                f"architecture {self.architecture[:60]!r}",
                f"one of {', '.join(FAMILIES)}; or the safetensors of this model",
            )
        is_mixtral = self.architecture == "llama" and self.number("expert_count") is not None
        return MIXTRAL if is_mixtral else FAMILIES[self.architecture]

    def _infos(self, file: str, header: GgufHeader) -> dict[str, TensorInfo]:
        infos: dict[str, TensorInfo] = {}
        for name, tensor in header.tensors.items():
            if name in OF_ROPE:
                self.rope.append(name)
                infos[name] = self._info(name, name, tensor, file)
                continue
            place = place_of(name, self.family)
            if place is None:
                raise CheckpointError(
                    self.asked,
                    f"tensor {name[:80]!r}, which {self.architecture} is not known to have",
                    "a file of the language model alone, as llama.cpp converts it",
                )
            for one, part in self._parts(place, name, tensor):
                infos[one] = self._info(one, place.stem, part, file, place.layer)
        return infos

    def _parts(self, place: Place, name: str, tensor: GgufTensor) -> Iterator[tuple[str, GgufTensor]]:
        """A tensor, or the matrix of each expert of a stack."""
        dimensions = (3,) if place.is_stack else (1, 2)
        experts = tensor.shape[0]
        if len(tensor.shape) not in dimensions or (place.is_stack and experts > MAX_EXPERTS):
            found = f"shape {list(tensor.shape)} of {name}"
            raise CheckpointError(self.asked, found, "matrices, stacks of experts, and vectors")
        if not place.is_stack:
            yield place.name, tensor
            return
        size = (tensor.end - tensor.start) // experts
        for expert in range(experts):
            start = tensor.start + expert * size
            yield place.name.format(expert), GgufTensor(tensor.shape[1:], tensor.kind, start, start + size)

    def _info(self, name: str, stem: str, tensor: GgufTensor, file: str, layer: int = -1) -> TensorInfo:
        shape, kind = tensor.shape, tensor.kind
        if stem == "ffn_gate_inp_shexp" and len(shape) == 1:
            shape = (1, *shape)
        if len(shape) == 1 and kind.name not in FLOATS:
            found = f"{kind.name} for the vector {name}"
            raise CheckpointError(self.asked, found, "vectors of F32, as llama.cpp writes them")
        heads = self._heads(stem, layer, shape, name) if self.family.permutes else 0
        plus_one = self.family.norms_plus_one and stem.endswith("norm")
        self.weights[name] = Weight(shape, kind, heads, plus_one)
        if kind.name not in FLOATS:
            shape = (*shape[:-1], shape[-1] // kind.block * kind.size)
        dtype = FLOATS.get(kind.name, torch.uint8)
        return TensorInfo(name, dtype, shape, tensor.start, tensor.end, file)

    def _heads(self, stem: str, layer: int, shape: tuple[int, ...], name: str) -> int:
        """Heads of q or k, in whose rows pairs lie side by side; 0 for all other tensors."""
        if stem not in ("attn_q", "attn_k"):
            return 0
        keys = ["attention.head_count"]
        if stem == "attn_k":
            keys.insert(0, "attention.head_count_kv")
        found = next(
            (v for k in keys if (v := self.values.get(f"{self.architecture}.{k}")) is not None), None
        )
        if isinstance(found, list):
            found = found[layer] if layer < len(found) else None
        if type(found) is not int or found < 1 or shape[0] % (2 * found):
            raise CheckpointError(
                self.asked, f"{str(found)[:40]} heads for {shape[0]} rows of {name}", "a pair of rows a head"
            )
        return found

    @property
    def directory(self) -> Path:
        """Where the files are."""
        return self._raw.directory

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, in order."""
        return self._raw.files

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """As `TensorSource.tensors`; those that are decoded when they are read as BF16."""
        return MappingProxyType(
            {
                name: _Decoded(self.weights[name].shape, info.nbytes)
                if self.weights[name].is_decoded
                else info
                for name, info in self._raw.tensors.items()
            }
        )

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """As `TensorSource.read`. What is decoded, and norms of Gemma, are fp32."""
        weight = self.weights.get(name)
        if weight is None or isinstance(rows, tuple):
            return self._raw.read(name, rows)  # which says that there is no such tensor
        values = self._in_order(name, weight, rows) if weight.heads else self._raw.read(name, rows)
        if weight.is_decoded:
            return _decode(values, weight.kind, f"read {name} of {self.path}")
        return values.float() - 1 if weight.plus_one else values

    def _in_order(self, name: str, weight: Weight, rows: slice | None) -> Tensor:
        """Rows of heads whose halves are stored as pairs: row ``2 i + h`` of a head is row i of half h."""
        first, last, _ = (rows or slice(None)).indices(weight.shape[0])
        if first >= last:
            return self._raw.read(name, rows)
        size = weight.shape[0] // weight.heads
        start, stop = first // size * size, -(-last // size) * size
        stored = self._raw.read(name, slice(start, stop))
        pairs = stored.view(-1, size // 2, 2, *stored.shape[1:])
        return pairs.transpose(1, 2).flatten(0, 2)[first - start : last - start].contiguous()

    def release(self, name: str, rows: Rows | None = None) -> None:
        """As `TensorSource.release`."""
        self._raw.release(name, rows)

    def verify(self) -> None:
        """As `VerifiedSource.verify`."""
        self._raw.verify()

    def close(self) -> None:
        """As `TensorSource.close`."""
        self._raw.close()


def _decode(blocks: Tensor, kind: GgmlType, asked: str) -> Tensor:
    """Values of blocks, as the library has them: fp32."""
    quants: Any = library(asked, "gguf.quants")
    enum = library(asked, "gguf").GGMLQuantizationType
    values: Tensor = torch.from_numpy(quants.dequantize(blocks.numpy(), enum[kind.name]).copy())
    return values


def library(asked: str, module: str = "gguf") -> Any:
    """The gguf library, or a module of it.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise CheckpointError(
            asked, "the gguf library is not installed", "pip install 'quantport[gguf]'"
        ) from None
