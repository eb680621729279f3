"""MXFP4 as GPT-OSS has it: the experts of a layer in one tensor of blocks and one of exponents.

Source: Transformers 5.23, ``integrations/mxfp4.py`` (``_convert_moe_packed_tensors``): ``X_blocks`` uint8
``[experts, n, groups, 16]``, the first code of a byte in its low bits, ``X_scales`` uint8 ``[experts, n,
groups]``; a value is ``e2m1 * 2 ** (scale - 127)``, and the weight of the model is transposed: ``[experts, k,
n]``.

Its experts have biases, a gate that is interleaved and an activation of its own, which no module of quantized
experts runs: they are decoded to 16 bits, exactly, for BF16 has every such value.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantport.checkpoint import CheckpointFormat, Coded, CodedTensor, Recognized, TensorSource
from quantport.numerics import dequantize_weight
from quantport.scheme import Scheme
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
        said = (
            f"{len(coded)} weights of experts in MXFP4 are decoded to 16 bits, four times the memory: "
            "no module runs quantized experts with biases and a gate of their own"
        )
        return Coded(self.name, source, coded, notices=[said])

    def _weight(self, source: TensorSource, name: str, dtype: torch.dtype, schemes: Schemes) -> CodedTensor:
        blocks, scales = f"{name}{_BLOCKS}", f"{name}{_SCALES}"
        experts, n, groups = (*source.tensors[blocks].shape, 0, 0, 0)[:3]
        shape = experts, n, groups
        wanted(source, self.name, blocks, [(*shape, _BYTES)], [torch.uint8])
        wanted(source, self.name, scales, [shape], [torch.uint8])
        read = partial(_read, source, (blocks, scales), schemes["mxfp4"], 2 * _BYTES * groups)
        weight = experts, 2 * _BYTES * groups, n
        return CodedTensor(weight, dtype, None, (blocks, scales), read=read)


def _read(
    source: TensorSource, names: tuple[str, str], scheme: Scheme, k: int, expert: int | None, rows: slice
) -> dict[str, Tensor]:
    """Rows of a transposed matrix: columns of the matrix that is stored."""
    assert expert is not None  # a stack
    blocks, scales = (source.read(name, slice(expert, expert + 1))[0] for name in names)
    stored = {"weight_packed": blocks.flatten(1), "weight_scale": scales}
    values = dequantize_weight(stored, scheme, k, torch.bfloat16)
    return {"weight": values.T[rows].contiguous()}
