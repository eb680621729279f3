"""Tells Diffusers of quantport: which configuration and which quantizer the name ``quantport`` means."""

from __future__ import annotations

import inspect

from diffusers.quantizers import auto

from quantport.engine import METHOD, merge_or_take_ours
from quantport_diffusers.config import QuantportConfig
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
    kind.merge_quantization_configs = staticmethod(merge_or_take_ours(merge, QuantportConfig))
