"""msModelSlim, Ascend's quantizer: ``quant_model_description.json`` names the kind of each tensor.

``W8A8_DYNAMIC`` and ``W8A16``: ``weight`` int8 ``[n, k]``, ``weight_scale`` and ``weight_offset`` ``[n, 1]``;
activations are quantized for each token, or not at all. Refused: ``W8A8``, whose ``quant_bias`` is the bias
less what a static offset of activations adds, and kinds of 4 bits, whose layout depends on the operator.

Source: vllm-ascend, ``quantization/methods/w8a8_dynamic.py``, ``w8a16.py``, ``w8a8_static.py``, ``w4a8.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantport.checkpoint import CheckpointFormat, Coded, CodedTensor, Recognized, TensorSource, read_json
from quantport.errors import CheckpointError, shown
from quantport.scheme.catalog import Schemes
from quantport_formats.common import held_dtype, need
from quantport_formats.pieces import SCALES, scheme_of, stored_matrix, wanted

_DESCRIPTION = "quant_model_description*.json"
_SCHEMES = {"W8A8_DYNAMIC": "int8", "W8A16": "int8_weight_only"}


class MsModelSlim(CheckpointFormat):
    """``quant_model_description.json`` beside weights in int8: ``W8A8_DYNAMIC`` and ``W8A16``."""

    name = "msmodelslim"

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """As `CheckpointFormat.recognize`."""
        codes = [n for n, i in source.tensors.items() if n.endswith(".weight") and i.dtype is torch.int8]
        files = sorted(source.directory.glob(_DESCRIPTION)) if codes else []
        if not files:
            return None
        said, dtype = read_json(files[0]), held_dtype(source, config)
        coded = {name: _weight(source, name, said.get(name), schemes, dtype) for name in codes}
        return Coded(self.name, source, coded)


def _weight(source: TensorSource, name: str, kind: Any, schemes: Schemes, dtype: torch.dtype) -> CodedTensor:
    asked = f"read {name} of {source.directory} as msmodelslim"
    if not isinstance(kind, str) or kind not in _SCHEMES:
        suggestion = (
            f"{' or '.join(_SCHEMES)}; or scheme='int8' (W8A8) or 'int4_w4a8' (W4A8), of the original"
        )
        raise CheckpointError(asked, f"weights of kind {shown(kind)}", suggestion)
    info, scale, offset = need(source, "msmodelslim", name), f"{name}_scale", f"{name}_offset"
    if len(info.shape) != 2 or not all(info.shape):
        raise CheckpointError(asked, f"codes of shape {list(info.shape)}", "a matrix")
    n, k = info.shape
    scales = wanted(source, "msmodelslim", scale, [(n, 1), (n,)], SCALES)
    also = [offset] if offset in source.tensors else []
    if also and source.read(offset).any():
        raise CheckpointError(asked, f"{offset} that is not zero", "weights that are quantized symmetrically")
    scheme = scheme_of(schemes, _SCHEMES[kind], "channel", scales)
    return stored_matrix(source, (n, k), dtype, scheme, {"weight": name, "weight_scale": scale}, also)
