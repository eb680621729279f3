"""Tells Transformers of quantport: which configuration and which quantizer the name ``quantport`` means."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

from transformers.quantizers import auto

from quantport.engine import METHOD, is_marked, merge_or_take_ours
from quantport_transformers.config import QuantportConfig
from quantport_transformers.quantizer import QuantportQuantizer


def register() -> None:
    """Registers configuration and quantizer; again is the same as once.

    Transformers lets a checkpoint that is quantized contradict the configuration that is passed, and refuses
    a ``quantization_config`` without ``quant_method``, which is how quantport marks what only it reads. So
    that quantport can read both, the two functions of ``AutoHfQuantizer`` that decide so ask first whether
    it is meant; everything else they answer as ever.
    """
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
    auto.register_quantization_config(METHOD)(QuantportConfig)
    auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
    auto.register_quantizer(METHOD)(QuantportQuantizer)
    kind = auto.AutoHfQuantizer
    supports = inspect.unwrap(kind.supports_quant_method)
    merge = inspect.unwrap(kind.merge_quantization_configs)

    @wraps(supports)
    def supports_or_is_ours(stored: Any) -> bool:
        return is_marked(stored) or bool(supports(stored))

    kind.supports_quant_method = staticmethod(supports_or_is_ours)
    kind.merge_quantization_configs = staticmethod(merge_or_take_ours(merge, QuantportConfig))
