"""GGUF, the format of llama.cpp: one file, or several, with weights, configuration and tokenizer.

Blocks that are a scheme here are kept byte for byte. MXFP4 has its nibbles put in order. IQ and ternary types
are decoded by the gguf library. Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md,
ggml ``ggml-common.h``; checked with gguf 0.19.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantport.checkpoint import (
    CheckpointFormat,
    Coded,
    CodedTensor,
    Fill,
    Recognized,
    SavedModel,
    SaveTarget,
    Stream,
    TensorLayout,
    TensorSource,
    read_config,
)
from quantport.scheme.catalog import Schemes
from quantport_formats.common import held_dtype
from quantport_formats.gguf_config import config_of, notices
from quantport_formats.gguf_source import FLOATS, GgufSource, find_files, library
from quantport_formats.gguf_tokenizer import tokenizer_files
from quantport_formats.gguf_write import SUFFIX, write

_MXFP4 = "MXFP4"
_ZERO_BELOW = 8  # code of -0, which ggml's table has as 0


class Gguf(CheckpointFormat):
    """A ``.gguf`` file, a directory with one, or the files of one model."""

    name = "gguf"
    file_suffix = SUFFIX

    def open(self, path: Path, *, headers_only: bool = False) -> TensorSource | None:
        """As `CheckpointFormat.open`."""
        files = find_files(path)
        return GgufSource(files, headers_only=headers_only) if files else None

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """As `CheckpointFormat.recognize`."""
        if not isinstance(source, GgufSource):
            return None
        dtype = held_dtype(source, config)
        coded = {}
        for name, weight in source.weights.items():
            if weight.is_decoded:
                library(source.asked)  # here, and not when half of the model is loaded
            elif weight.kind.name == _MXFP4:
                read, scheme = partial(_read_mxfp4, source, name), schemes["mxfp4_weight_only"]
                coded[name] = CodedTensor(weight.shape, dtype, scheme, (name,), read=read)
            elif weight.kind.name not in FLOATS:
                scheme, keys = schemes[weight.kind.name], {"weight_blocks": name}
                coded[name] = CodedTensor(weight.shape, dtype, scheme, (name,), keys)
        return _GgufModel(self.name, source, coded)

    def write(
        self, model: SavedModel, tensors: Stream | Fill, layout: TensorLayout | None, to: SaveTarget
    ) -> Path:
        """As `CheckpointFormat.write`: a file for a path that ends with ``.gguf``, else a directory."""
        return write(model, tensors, layout, to)


class _GgufModel(Coded):
    def __init__(self, format_name: str, source: GgufSource, coded: Mapping[str, CodedTensor]) -> None:
        super().__init__(format_name, source, coded, unlisted=source.rope)
        self._gguf = source

    def config(self) -> dict[str, Any] | None:
        """What the metadata says, where ``config.json`` beside the file does not say which class it is."""
        return None if read_config(self._gguf.directory).get("architectures") else self._described

    @cached_property
    def _described(self) -> dict[str, Any]:
        return config_of(self._gguf)

    @property
    def home(self) -> Path:
        """The file, where it says what the model is."""
        return self._gguf.directory if self.config() is None else self._gguf.path

    def companions(self) -> Mapping[str, bytes | Path]:
        """The tokenizer of the file; where ``config.json`` beside it counts, what is there."""
        return super().companions() if self.config() is None else tokenizer_files(self._gguf.path)

    def pretrained(self) -> dict[str, str]:
        """The file has the tokenizer."""
        path = self._gguf.path
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}

    def notices(self) -> tuple[str, ...]:
        """What is decoded, and what of the metadata has no place."""
        return notices(self._gguf, self.config())


def _read_mxfp4(source: GgufSource, name: str, expert: int | None, rows: slice) -> dict[str, Tensor]:
    """Codes and exponents of blocks: an exponent, then code j low and code j + 16 high.

    ggml's table has twice the values of e2m1, and its exponents halve: the numbers are those of the scheme.
    """
    blocks = source.read(name, rows)
    blocks = blocks.view(blocks.shape[0], -1, 17)
    packed = blocks[..., 1:]
    codes = torch.cat((packed & 15, packed >> 4), 2)
    codes = torch.where(codes == _ZERO_BELOW, 0, codes).view(blocks.shape[0], -1)
    return {
        "weight_packed": codes[:, ::2] | codes[:, 1::2] << 4,
        "weight_scale": blocks[..., 0].contiguous(),
    }
