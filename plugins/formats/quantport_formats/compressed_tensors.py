"""Checkpoints of compressed-tensors, which llm-compressor writes: codes of 2 to 8 bits with scales for
tensors, rows, groups or blocks, zero points, and the small floats of MX and NVFP4.

Source: compressed-tensors 0.20: ``compressors/*/base.py``, ``quantization/lifecycle/initialize.py`` for the
shapes of scales. Values are those that ``decompress`` gives where it computes in fp32; the scales are stored
in the dtype of the model, and the library rounds to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantport.checkpoint import Recognized, SavedModel, TensorSource
from quantport.scheme.catalog import Schemes
from quantport_formats.common import held_dtype, quant_method, quantizer_config
from quantport_formats.compressed_tensors_config import Group, Groups
from quantport_formats.compressed_tensors_write import writing
from quantport_formats.module_weights import Weights
from quantport_formats.of_modules import coded_modules, of_modules
from quantport_formats.writing import Writing, WrittenFormat

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embeddings")


class CompressedTensors(WrittenFormat):
    """``quant_method: compressed-tensors`` over tensors that hold codes."""

    name = "compressed-tensors"
    default = True

    def writing(self, asked: str, model: SavedModel) -> Writing:
        """As `WrittenFormat.writing`, of the schemes that this format has."""
        return writing(asked, model)

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
