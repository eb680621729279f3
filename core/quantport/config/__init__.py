"""The configuration: what to quantize and how, in our words and in those of vLLM."""

from quantport.config.schema import QuantConfig

__all__ = ["QuantConfig"]
