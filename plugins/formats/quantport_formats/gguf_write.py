"""Writing GGUF: blocks as they are stored, under the names and in the order of rows that llama.cpp has, with
metadata and tokenizer in the one file.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; llama.cpp ``conversion/base.py``,
``prepare_tensors``, which keeps vectors and routers in F32; ``conversion/llama.py``, ``LlamaModel.permute``.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantport.checkpoint import (
    Fill,
    Head,
    OneFile,
    Rewrite,
    SavedModel,
    SaveTarget,
    Stream,
    TensorLayout,
    rewritten,
)
from quantport.errors import SaveError
from quantport_formats.gguf_header import TYPES, GgmlType
from quantport_formats.gguf_metadata import add_metadata, architecture_of
from quantport_formats.gguf_names import FAMILIES, Family, Place, stored_place
from quantport_formats.gguf_source import FLOATS, library
from quantport_formats.gguf_tokenizer import add_tokenizer
from quantport_formats.writing import config_json, written_weights

SUFFIX = ".gguf"
_BLOCKS = {kind.name.lower(): kind for kind in TYPES.values() if kind.name.startswith("Q")}
_OF_DTYPE = {FLOATS[kind.name]: kind for kind in TYPES.values() if kind.name in ("F32", "F16", "BF16")}
_F32 = _OF_DTYPE[torch.float32]
_FILE_TYPES = {"F32": "ALL_F32", **{f"Q{bits}_K": f"MOSTLY_Q{bits}_K_S" for bits in (2, 3, 4, 5)}}
_ROUTER, _ROTATED = "ffn_gate_inp", ("attn_q", "attn_k")
_OTHERWISE = "format='quantport', which holds it"


@dataclass(frozen=True)
class _Tensor:
    """A tensor on its way into the file: where it goes, and the type and the shape that it has there."""

    place: Place
    kind: GgmlType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.block * self.kind.size


def write(model: SavedModel, tensors: Stream | Fill, layout: TensorLayout | None, to: SaveTarget) -> Path:
    """Writes a file, alone or with the others of the model in a directory; arguments as for
    `CheckpointFormat.write`.

    Raises:
        SaveError: a scheme, a tensor, an architecture or a tokenizer that the format cannot hold; as
            `save_tensors`.
    """
    target = Path(to.directory)
    asked = f"save a checkpoint to {target} as gguf"
    if layout is None:
        raise SaveError(asked, "tensors whose shapes are not said", "a layout")
    architecture, config = architecture_of(asked, model.config), dict(model.config or {})
    placed = dict(_placed(asked, model, layout, FAMILIES[architecture]))
    gguf: Any = library(asked)
    with TemporaryDirectory() as scratch:
        writer = gguf.GGUFWriter(Path(scratch) / "head", architecture)
        writer.add_type("model")
        writer.add_name(target.stem)
        further = add_metadata(asked, writer, config)
        add_tokenizer(asked, writer, to.files, config)
        placed |= {name: _Tensor(Place(name, name), _F32, tuple(t.shape)) for name, t in further.items()}
        head = _head(asked, gguf, writer, placed)
    changes = {
        name: _rewrite(name, placed[name], shape, config, FAMILIES[architecture])
        for name, (shape, _) in layout.items()
    }
    tensors, layout = rewritten(tensors, layout, changes, further)
    file = OneFile(f"model{SUFFIX}", lambda _: head, alone=target.name.endswith(SUFFIX))
    lost = [*_activations(model), *(_generation(to.files) if file.alone else ())]
    return to.save(tensors, layout, config_json(asked, model, lost=lost), file)


def _placed(
    asked: str, model: SavedModel, layout: TensorLayout, family: Family
) -> Iterator[tuple[str, _Tensor]]:
    """Every tensor of a layout, in its order."""
    blocks = {}
    for weight in written_weights(asked, model.layers, embeddings=True):
        kind = _BLOCKS.get(weight.scheme.weight.format)
        if weight.scheme.weight.format == "bf16":
            continue
        if kind is None or weight.scheme.rotation:
            suggestion = f"one of {', '.join(_BLOCKS)}, or {_OTHERWISE}"
            raise SaveError(asked, f"scheme {weight.scheme.name!r}, which GGUF cannot hold", suggestion)
        if weight.k % kind.block:
            found = f"{weight.stem}, whose {weight.k} columns are no whole blocks of {kind.block}"
            raise SaveError(asked, found, f"q8_0 or another scheme of 32 for it, or {_OTHERWISE}")
        place = _place(asked, f"{weight.stem}.weight", family)
        blocks[f"{weight.stem}.weight_blocks"] = _Tensor(place, kind, (weight.n, weight.k))
    for name, (shape, dtype) in layout.items():
        if name in blocks:
            yield name, blocks[name]
            continue
        place = _place(asked, name, family)
        if dtype not in _OF_DTYPE:
            known = ", ".join(map(str, _OF_DTYPE))
            raise SaveError(asked, f"{name} of {dtype}, which GGUF has no weights of", f"one of {known}")
        yield name, _Tensor(place, _F32 if _is_small(place, shape) else _OF_DTYPE[dtype], shape)


def _activations(model: SavedModel) -> list[str]:
    """What the schemes say of activations, for which GGUF has no place: llama.cpp has its own way."""
    schemes = {s.name for layer in model.layers.values() for s in layer.schemes.values() if s.activation}
    return [f"how {', '.join(sorted(schemes))} quantizes activations"] if schemes else []


def _generation(files: Mapping[str, bytes | Path]) -> list[str]:
    """What ``generation_config.json`` says beyond one id for each role, which the file has."""
    content = files.get("generation_config.json", b"{}")
    said = json.loads(content if isinstance(content, bytes) else content.read_bytes())
    said = {key: value for key, value in said.items() if value not in (None, False)}
    held = ("_token_id", "version", "use_cache")  # the last is no matter of answers
    more = [key for key, value in said.items() if isinstance(value, list) or not key.endswith(held)]
    return [f"{', '.join(sorted(more))} of generation_config.json"] if more else []


def _place(asked: str, name: str, family: Family) -> Place:
    place = stored_place(name, family)
    if place is None:
        found = f"{name}, which a {family.model_type} of GGUF has not"
        raise SaveError(asked, found, f"every expert quantized, if it is one; or {_OTHERWISE}")
    return place


def _is_small(place: Place, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp wants a tensor in F32: norms, biases and routers."""
    return len(shape) == 1 or place.stem == _ROUTER


def _rewrite(
    name: str, tensor: _Tensor, shape: tuple[int, ...], config: Mapping[str, Any], family: Family
) -> Rewrite:
    """How a tensor is written: vectors in F32, and the halves of the heads of q and k in pairs."""
    to_32_bits = tensor.kind is _F32
    heads = config["num_attention_heads" if tensor.place.stem == "attn_q" else "num_key_value_heads"]
    together = shape[0] // heads if family.permutes and tensor.place.stem in _ROTATED else 1

    def convert(rows: Tensor) -> Tensor:
        rows = rows.float() if to_32_bits else rows
        if together == 1:
            return rows
        return rows.view(-1, 2, together // 2, *rows.shape[1:]).transpose(1, 2).flatten(0, 2)

    return Rewrite(name, convert, (shape, torch.float32) if to_32_bits else None, together)


def _head(asked: str, gguf: Any, writer: Any, placed: Mapping[str, _Tensor]) -> Head:
    """What the file begins with. The experts of a stack lie side by side, in order."""
    most = Counter(t.kind.name for t in placed.values() if len(t.shape) == 2).most_common(1)[0][0]
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES.get(most, f"MOSTLY_{most}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    stored: dict[str, list[str]] = {}
    for name, tensor in placed.items():
        stored.setdefault(tensor.place.name, []).append(name)
    starts, end = dict[str, int](), 0
    for place, names in stored.items():
        first = placed[names[0]]
        other = next((name for name in names if placed[name].kind is not first.kind), None)
        if other is not None:
            found = f"{other} of {placed[other].kind.name} beside {names[0]} of {first.kind.name}"
            raise SaveError(asked, found, f"one scheme for the experts of a layer, or {_OTHERWISE}")
        shape = (len(names), *first.shape) if first.place.is_stack else first.shape
        size, kind = len(names) * first.nbytes, gguf.GGMLQuantizationType[first.kind.name]
        writer.add_tensor_info(place, shape, np.float32, size, raw_dtype=kind)
        starts |= {name: end + max(0, placed[name].place.expert) * first.nbytes for name in names}
        end += -(-size // writer.data_alignment) * writer.data_alignment
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    raw = writer.path.read_bytes()
    return raw + bytes(-len(raw) % writer.data_alignment), starts, end
