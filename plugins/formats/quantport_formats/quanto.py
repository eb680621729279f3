"""optimum-quanto: the codes of a weight under ``weight._data``, its scales under ``weight._scale``.

8 bits: int8 or FP8 ``[n, k]``, and a scale for each row. Codes of 4 and 2 bits are stored as a list of groups
without the shape of the weight, which only the model knows: they are refused.

Source: optimum-quanto 0.2.7, ``models/transformers_models.py``, ``tensor/qbytes.py``, ``tensor/qbits.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantport.checkpoint import CheckpointFormat, Coded, CodedTensor, Recognized, TensorSource
from quantport.errors import CheckpointError
from quantport.scheme.catalog import Schemes
from quantport_formats.common import held_dtype, need
from quantport_formats.pieces import SCALES, scheme_of, stored_matrix, wanted

_CODES = ".weight._data"
_SCHEMES = {torch.int8: "int8_weight_only", torch.float8_e4m3fn: "fp8_weight_only"}


class Quanto(CheckpointFormat):
    """Codes under ``weight._data``, as ``QuantizedModelForCausalLM.save_pretrained`` writes them."""

    name = "quanto"

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """As `CheckpointFormat.recognize`."""
        stems = [name[: name.index(_CODES)] for name in source.tensors if _CODES in name]
        if not stems:
            return None
        dtype = held_dtype(source, config)
        coded = {f"{stem}.weight": _weight(source, stem, schemes, dtype) for stem in stems}
        ends = (".input_scale", ".output_scale")
        of_activations = [
            f"{stem}{end}" for stem in stems for end in ends if f"{stem}{end}" in source.tensors
        ]
        static = [
            name for name in of_activations if not torch.all(source.read(name) == 1)
        ]  # 1: not calibrated
        text = f"{len(static)} static scales of activations ({', '.join(static[:1])}, ...) are not used"
        return Coded(self.name, source, coded, unlisted=of_activations, notices=(text,) if static else ())


def _weight(source: TensorSource, stem: str, schemes: Schemes, dtype: torch.dtype) -> CodedTensor:
    codes, scale, asked = (
        f"{stem}{_CODES}",
        f"{stem}.weight._scale",
        f"read {stem} of {source.directory} as quanto",
    )
    if f"{codes}._data" in source.tensors:
        found = "codes of 4 or 2 bits, stored without the shape of the weight"
        raise CheckpointError(asked, found, "qint8 or qfloat8; or scheme='int4_weight_only', of the original")
    info = need(source, "quanto", codes)
    if info.dtype not in _SCHEMES or len(info.shape) != 2 or not all(info.shape):
        found = f"codes of shape {list(info.shape)}, dtype {info.dtype}"
        raise CheckpointError(asked, found, f"a matrix of {' or '.join(map(str, _SCHEMES))}")
    n, k = info.shape
    kind = wanted(source, "quanto", scale, [(n, 1)], SCALES)
    scheme = scheme_of(schemes, _SCHEMES[info.dtype], "channel", kind)
    return stored_matrix(source, (n, k), dtype, scheme, {"weight": codes, "weight_scale": scale})
