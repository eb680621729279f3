"""FP8 as DeepSeek, Qwen and Transformers' ``FineGrainedFP8Config`` store it: e4m3fn weights, and scales that
values are multiplied by.

Sources: ``weight_scale_inv`` per 128x128 block: DeepSeek-V3, ``inference/kernel.py``; a scale per tensor
under ``weight_scale``, with ``input_scale``: AutoFP8, as vLLM's ``fp8.py`` reads it; the same as
``weight_scale_inv`` and ``activation_scale``: Transformers, ``integrations/finegrained_fp8.py``. Scales are
fp32, the dtype of the model, or e8m0 exponents (``scale_fmt: ue8m0``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantport.checkpoint import Coded, CodedTensor, Recognized, Rewrite, SavedModel, TensorSource
from quantport.errors import CheckpointError, SaveError
from quantport.scheme.catalog import BUILTIN, Schemes
from quantport_formats.common import (
    exponents,
    held_dtype,
    need,
    quant_method,
    quantizer_config,
    without_static_scales,
)
from quantport_formats.input_scales import InputScale
from quantport_formats.writing import OWN, Writing, WrittenFormat, as_scalar, one_of, written_weights

_BLOCK = 128
_WRITTEN = ("fp8_per_block", "fp8_per_block:static", "fp8_per_tensor:static")
_OF_INPUTS = ("activation_scale", "input_scale")


class Fp8(WrittenFormat):
    """``quant_method: fp8`` with ``weight_scale_inv`` or ``weight_scale``; experts alone or stacked."""

    name = "fp8"

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """As `CheckpointFormat.recognize`."""
        weights = [name for name, info in source.tensors.items() if info.dtype is torch.float8_e4m3fn]
        if quant_method(config) != "fp8" or not weights:
            return None
        said = quantizer_config(config)
        blocks = said.get("weight_block_size")
        if blocks not in (None, [_BLOCK, _BLOCK]):
            raise CheckpointError(
                f"read {source.directory} as fp8",
                f"weight_block_size {blocks!r}",
                f"blocks of {_BLOCK}x{_BLOCK}, or a scale for each tensor or row",
            )
        dtype = held_dtype(source, config)
        coded = {name: self._weight(source, name, dtype, schemes, blocks is not None) for name in weights}
        if said.get("activation_scheme") == "static":
            named = [end for end in _OF_INPUTS if any(name.endswith(end) for name in source.tensors)]
            usual = next(iter(named), _OF_INPUTS[0])
            coded = {name: _static(source, name, weight, schemes, usual) for name, weight in coded.items()}
            more = {}
        else:
            more = without_static_scales(source, coded)
        if said.get("scale_fmt") == "ue8m0":
            text = "scales of activations are fp32, not powers of two as scale_fmt ue8m0 asks for"
            more["notices"] = (*more.get("notices", ()), text)
        return Coded(self.name, source, coded, **more)

    def writing(self, asked: str, model: SavedModel) -> Writing:
        """As `WrittenFormat.writing`: layers of ``fp8_per_block`` whose sizes are multiples of 128, or with
        one scale for a tensor and one for its activations; all alike.
        """
        changes, kinds = dict[str, Rewrite](), dict[str, str]()
        for path, stem, scheme, n, k in written_weights(asked, model.layers):
            held, in_blocks = one_of(scheme, _WRITTEN), scheme.weight.group_size > 0
            experts = " of experts, whose scales Transformers fuses" * bool(model.layers[path].experts)
            if held is None or (in_blocks and (n % _BLOCK or k % _BLOCK)) or (scheme.static and experts):
                found = f"{path} [{n}, {k}] in scheme {scheme.name}{experts}"
                suggestion = f"fp8_per_block for layers of multiples of {_BLOCK}, or {OWN}"
                raise SaveError(asked, found, suggestion)
            kinds.setdefault(held, path)
            scale, inverse = f"{stem}.weight_scale", f"{stem}.weight_scale_inv"
            changes[scale] = Rewrite(inverse) if in_blocks else as_scalar(scale, inverse)
            if scheme.static:
                changes[f"{stem}.input_scale"] = as_scalar(f"{stem}.input_scale", f"{stem}.activation_scale")
        if len(kinds) > 1:
            found = " and ".join(f"{path} in scheme {kind}" for kind, path in kinds.items())
            raise SaveError(asked, found, f"one of them for all layers, or {OWN}")
        scheme = BUILTIN[next(iter(kinds), _WRITTEN[0])]
        described = {
            "quant_method": "fp8",
            "activation_scheme": "static" if scheme.static else "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [_BLOCK, _BLOCK] if scheme.weight.group_size else None,
            "modules_to_not_convert": list(model.kept_linear),
        }
        return Writing(described, changes)

    def _weight(
        self, source: TensorSource, name: str, dtype: torch.dtype, schemes: Schemes, in_blocks: bool
    ) -> CodedTensor:
        shape, inverse = tuple(source.tensors[name].shape), f"{name}_scale_inv"
        if len(shape) not in (2, 3) or not all(shape):
            found = f"codes of shape {list(shape)}"
            suggestion = "a matrix, or a stack of matrices of experts"
            raise CheckpointError(f"read {name} of {source.directory} as fp8", found, suggestion)
        *stack, n, k = shape
        scale = inverse if inverse in source.tensors else f"{name}_scale"
        count = tuple(need(source, self.name, scale).shape)
        blocks = (*stack, -(-n // _BLOCK), -(-k // _BLOCK))
        one = [(*stack, *(1,) * ones) for ones in range(3)]
        if scale == inverse and (in_blocks or count not in one):
            need(source, self.name, scale, blocks)
            scheme = schemes["fp8_per_block"]
        elif count in ((n,), (n, 1)) and n > 1 and not stack:
            scheme = schemes["fp8_per_channel"]
        else:
            need(source, self.name, scale, count if count in one else one[0])
            scheme = schemes["fp8_per_tensor"]
        as_stored = source.tensors[scale].dtype is torch.float32 and count == blocks and not stack
        keys = {"weight": name, "weight_scale": scale} if as_stored else {}
        read = None if as_stored else partial(_read, source, name, scale, scheme.weight.block_shape)
        return CodedTensor(shape, dtype, scheme, (name, scale), keys, read)


def _read(
    source: TensorSource, name: str, scale: str, block: tuple[int, int], expert: int | None, rows: slice
) -> dict[str, Tensor]:
    """Codes of some rows, and their scales in fp32: ``[blocks down, blocks across]``."""
    codes = source.read(name, rows if expert is None else (expert, rows))
    down, across = block
    if not down:
        one = exponents(source.read(scale)).flatten()[expert or 0]
        return {"weight": codes, "weight_scale": one.reshape(1, 1)}
    some = slice(rows.start // down, -(-rows.stop // down))
    scales = source.read(scale, some if expert is None else (expert, some))
    columns = scales.shape[-1] if across else 1
    return {"weight": codes, "weight_scale": exponents(scales).reshape(-1, columns)}


def _static(
    source: TensorSource, name: str, weight: CodedTensor, schemes: Schemes, usual: str
) -> CodedTensor:
    """A weight with the scale of its inputs: ``input_scale`` of AutoFP8, or ``activation_scale`` of
    Transformers; ``usual`` is the one that its checkpoint has.
    """
    stem = f"{name.removesuffix('.weight')}{'.' if name.endswith('.weight') else '_'}"
    end = next((end for end in _OF_INPUTS if f"{stem}{end}" in source.tensors), usual)
    return InputScale(source, "fp8", f"{stem}{end}").beside(weight, schemes)
