"""Checkpoints of compressed-tensors, which llm-compressor writes: codes of 2 to 8 bits with scales for
tensors, rows, groups or blocks, zero points, and the small floats of MX and NVFP4.

Source: compressed-tensors 0.20: ``compressors/*/base.py``, ``quantization/lifecycle/initialize.py`` for the
shapes of scales. Values are those that ``decompress`` gives where it computes in fp32; the scales are stored
in the dtype of the model, and the library rounds to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantport.checkpoint import (
    CheckpointFormat,
    Fill,
    Recognized,
    SavedModel,
    SaveTarget,
    Stream,
    TensorLayout,
    TensorSource,
)
from quantport.scheme.catalog import Schemes
from quantport_formats.common import held_dtype, quant_method, quantizer_config
from quantport_formats.compressed_tensors_config import Group, Groups
from quantport_formats.compressed_tensors_write import write
from quantport_formats.module_weights import Weights
from quantport_formats.of_modules import coded_modules, of_modules

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embeddings")


class CompressedTensors(CheckpointFormat):
    """``quant_method: compressed-tensors`` over tensors that hold codes."""

    name = "compressed-tensors"

    def write(
        self, model: SavedModel, tensors: Stream | Fill, layout: TensorLayout | None, to: SaveTarget
    ) -> Path:
        """As `CheckpointFormat.write`, of the schemes that this format has."""
        return write(model, tensors, layout, to)

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """As `CheckpointFormat.recognize`."""
        modules = list(coded_modules(source))
        if quant_method(config) != self.name or not modules:
            return None
        groups = Groups(quantizer_config(config), f"read {source.directory} as {self.name}")
        weights = Weights(self.name, source, schemes, held_dtype(source, config))

        def group_of(module: str) -> Group:
            return groups.of(module, module.rpartition(".")[2] in _EMBEDDINGS)

        return of_modules(weights, modules, group_of, groups.cache)
