"""Tells Diffusers of quantport: which configuration and which quantizer the name ``quantport`` means."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import wraps
from typing import Any

from diffusers.quantizers import auto

from quantport.engine import ConfigError
from quantport_diffusers.config import METHOD, QuantportConfig
from quantport_diffusers.quantizer import QuantportQuantizer


def register() -> None:
    """Registers configuration and quantizer; again is the same as once.

    Diffusers lets a checkpoint that is quantized contradict the configuration that is passed, and refuses a
    ``quantization_config`` without ``quant_method``, which is how quantport marks what only it reads. So that
    quantport can read both, ``merge_quantization_configs`` asks first whether it is meant; everything else it
    answers as ever.
    """
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = QuantportConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = QuantportQuantizer
    kind = auto.DiffusersAutoQuantizer
    merge = inspect.unwrap(kind.merge_quantization_configs)

    @wraps(merge)
    def merge_or_take_ours(stored: Any, asked: Any) -> Any:
        if _is_asked_for(asked):
            return asked if isinstance(asked, QuantportConfig) else QuantportConfig(**asked)
        if not (isinstance(stored, Mapping) and stored.get("quantized_by") == METHOD):
            return merge(stored, asked)
        if asked is None:
            return QuantportConfig()
        raise ConfigError(
            f"load it with a {type(asked).__name__}",
            "quantport has quantized the checkpoint",
            "no quantization_config, or a QuantportConfig",
        )

    kind.merge_quantization_configs = staticmethod(merge_or_take_ours)


def _is_asked_for(asked: Any) -> bool:
    by_name = isinstance(asked, Mapping) and asked.get("quant_method") == METHOD
    return by_name or isinstance(asked, QuantportConfig)
