"""MXFP8 as Transformers stores it under ``quant_method: mxfp8``: e4m3fn weights, and an exponent for each 32
of a row under ``weight_scale_inv``, by which values are multiplied.

Source: Transformers 5.23, ``integrations/finegrained_fp8.py``, ``quantizers/quantizer_finegrained_fp8.py``
and ``FineGrainedFP8Config`` with ``weight_block_size: [1, 32]`` and ``scale_fmt: ue8m0``; scales are bytes or
``float8_e8m0fnu``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantport.checkpoint import Coded, CodedTensor, Recognized, Rewrite, SavedModel, TensorSource
from quantport.errors import CheckpointError, SaveError
from quantport.scheme import Scheme
from quantport.scheme.catalog import Schemes
from quantport_formats.common import held_dtype, quant_method, quantizer_config
from quantport_formats.pieces import wanted
from quantport_formats.writing import OWN, Writing, WrittenFormat, one_of, written_weights

_BLOCK = 32
_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
_STATIC = (".activation_scale", ".input_scale")


class Mxfp8(WrittenFormat):
    """``quant_method: mxfp8``; weights of experts alone or stacked."""

    name = "mxfp8"

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """As `CheckpointFormat.recognize`."""
        weights = [n for n, i in source.tensors.items() if i.dtype is torch.float8_e4m3fn]
        if quant_method(config) != self.name or not weights:
            return None
        blocks = quantizer_config(config).get("weight_block_size")
        if blocks not in (None, [1, _BLOCK]):
            raise CheckpointError(
                f"read {source.directory} as {self.name}", f"weight_block_size {str(blocks)[:80]}", "[1, 32]"
            )
        dtype, scheme = held_dtype(source, config), schemes["mxfp8"]
        coded = {name: self._weight(source, name, dtype, scheme) for name in weights}
        spare = [name for name in source.tensors if name.endswith(_STATIC)]
        said = (f"{len(spare)} static scales of activations ({spare[0]}, ...) are not used",) if spare else ()
        return Coded(self.name, source, coded, unlisted=spare, notices=said)

    def writing(self, asked: str, model: SavedModel) -> Writing:
        """As `WrittenFormat.writing`: layers of ``mxfp8`` in whole blocks."""
        changes = {}
        for _, stem, scheme, n, k in written_weights(asked, model.layers):
            if not one_of(scheme, [self.name]) or k % _BLOCK:
                found = f"{stem} [{n}, {k}] in scheme {scheme.name}"
                raise SaveError(asked, found, f"mxfp8 for layers of multiples of {_BLOCK}, or {OWN}")
            changes[f"{stem}.weight_scale"] = Rewrite(f"{stem}.weight_scale_inv")
        described = {
            "quant_method": self.name,
            "activation_scheme": "dynamic",
            "weight_block_size": [1, _BLOCK],
            "scale_fmt": "ue8m0",
            "modules_to_not_convert": list(model.kept_linear),
        }
        return Writing(described, changes)

    def _weight(self, source: TensorSource, name: str, dtype: torch.dtype, scheme: Scheme) -> CodedTensor:
        shape, scale = tuple(source.tensors[name].shape), f"{name}_scale_inv"
        if len(shape) not in (2, 3) or not all(shape):
            raise CheckpointError(
                f"read {name} of {source.directory} as {self.name}",
                f"codes of shape {list(shape)}",
                "a matrix, or a stack of matrices of experts",
            )
        blocks = (*shape[:-1], -(-shape[-1] // _BLOCK))
        kind = wanted(source, self.name, scale, [blocks], _EXPONENTS)
        if len(shape) == 2 and kind is torch.uint8:
            keys = {"weight": name, "weight_scale": scale}
            return CodedTensor(shape, dtype, scheme, (name, scale), keys)
        return CodedTensor(shape, dtype, scheme, (name, scale), read=partial(_read, source, name, scale))


def _read(source: TensorSource, name: str, scale: str, expert: int | None, rows: slice) -> dict[str, Tensor]:
    some = rows if expert is None else (expert, rows)
    return {
        "weight": source.read(name, some),
        "weight_scale": source.read(scale, some).view(torch.uint8),
    }
