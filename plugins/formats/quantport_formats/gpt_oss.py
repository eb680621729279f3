"""MXFP4 as GPT-OSS has it: the experts of a layer in one tensor of blocks and one of exponents.

Source: Transformers 5.23, ``integrations/mxfp4.py`` (``_convert_moe_packed_tensors``): ``X_blocks`` uint8
``[experts, n, groups, 16]``, the first code of a byte in its low bits, ``X_scales`` uint8 ``[experts, n,
groups]``; a value is ``e2m1 * 2 ** (scale - 127)``. The weight of the model is transposed, ``[experts, k,
n]``; the rows of gate and up take turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantport.checkpoint import CheckpointFormat, Coded, CodedTensor, Recognized, TensorSource
from quantport.scheme.catalog import Schemes
from quantport_formats.common import held_dtype, quant_method
from quantport_formats.pieces import wanted

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES = 16  # of a block


class GptOss(CheckpointFormat):
    """``quant_method: mxfp4`` with ``X_blocks`` and ``X_scales``."""

    name = "mxfp4"

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """As `CheckpointFormat.recognize`."""
        stacks = [n for n in source.tensors if n.endswith(_BLOCKS)]
        if quant_method(config) != self.name or not stacks:
            return None
        dtype = held_dtype(source, config)
        coded = {
            name.removesuffix(_BLOCKS): self._weight(source, name.removesuffix(_BLOCKS), dtype, schemes)
            for name in stacks
        }
        return Coded(self.name, source, coded, alternates=True)

    def _weight(self, source: TensorSource, name: str, dtype: torch.dtype, schemes: Schemes) -> CodedTensor:
        blocks, scales = f"{name}{_BLOCKS}", f"{name}{_SCALES}"
        experts, n, groups = (*source.tensors[blocks].shape, 0, 0, 0)[:3]
        shape = experts, n, groups
        wanted(source, self.name, blocks, [(*shape, _BYTES)], [torch.uint8])
        wanted(source, self.name, scales, [shape], [torch.uint8])
        read = partial(_read, source, (blocks, scales))
        return CodedTensor(
            (experts, n, 2 * _BYTES * groups),
            dtype,
            schemes["mxfp4_weight_only"],
            (blocks, scales),
            read=read,
        )


def _read(source: TensorSource, names: tuple[str, str], expert: int | None, rows: slice) -> dict[str, Tensor]:
    assert expert is not None  # a stack
    blocks, scales = (source.read(name, (expert, rows)) for name in names)
    return {"weight_packed": blocks.flatten(1), "weight_scale": scales}
