"""Marks the configurations of quantized models, which others may write beside what they make of its state
dict: with the mark, Transformers refuses to read that.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from quantport.checkpoint.quantport_format import MARK
from quantport.modules import QuantModule


def mark_configs(model: nn.Module) -> None:
    """Marks the configuration of every module that holds quantized layers: a block refers to that of its
    model.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict") and any(isinstance(m, QuantModule) for m in module.modules()):
            config.quantization_config = dict(MARK)
