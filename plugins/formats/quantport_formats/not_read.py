"""Formats that are known and not read: whoever opens such a checkpoint is told what it is, and what to do.

Sources: the documentation of Transformers (``quantization/overview``); vLLM's ``deepspeedfp.py``, which
quantizes 16-bit weights while loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantport.checkpoint import CheckpointFormat, Recognized, StoredTensor, TensorSource
from quantport.errors import CheckpointError
from quantport.scheme.catalog import Schemes
from quantport_formats.common import quant_method

_METHODS = {
    "eetq": (
        "EETQ: codes in the order of its GPU kernels",
        "scheme='int8_weight_only', of the 16-bit original",
    ),
    "deepspeedfp": (
        "DeepSpeedFP: a configuration that says what to do while loading, over weights in 16 bits",
        "scheme='fp6' or scheme='fp8_weight_only', and config.json without quantization_config",
    ),
    "aqlm": ("AQLM: additive code books", "scheme='int4_weight_only', of the 16-bit original"),
    "vptq": ("VPTQ: vector code books", "scheme='int4_weight_only', of the 16-bit original"),
    "spqr": ("SpQR: codes beside sparse outliers", "scheme='int4_weight_only', of the 16-bit original"),
    "higgs": ("HIGGS: rotated vector code books", "scheme='int4:hadamard', of the 16-bit original"),
    "bitnet": ("BitNet: ternary weights", "the 16-bit master weights of the model, where it has them"),
}


_ONLINE = ("deepspeedfp",)  # what says how to quantize weights in 16 bits


def _is_codes(info: StoredTensor) -> bool:
    return info.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32) and len(info.shape) > 1


class NotRead(CheckpointFormat):
    """Refuses EETQ, DeepSpeedFP, AQLM, VPTQ, SpQR, HIGGS and BitNet."""

    name = "not-read"

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """Returns None.

        Raises:
            CheckpointError: it is a checkpoint of one of these formats.
        """
        method = quant_method(config)
        if method not in _ONLINE and not any(map(_is_codes, source.tensors.values())):
            return None  # weights in 16 bits; a configuration over them is refused as stale
        found = _METHODS.get(method)
        if found is None:
            return None
        what, suggestion = found
        raise CheckpointError(
            f"open the checkpoint {source.directory}",
            f"it is quantized already, quant_method {method!r}. {what}",
            suggestion,
        )
