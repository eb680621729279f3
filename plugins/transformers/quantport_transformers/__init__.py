"""Transformers takes quantport as it takes any quantizer: importing this package tells it so.

Example:
    >>> from quantport_transformers import QuantportConfig
    >>> QuantportConfig("fp8_per_block", ignore=["lm_head"]).to_dict()
    {'quant_method': 'quantport', 'scheme': 'fp8_per_block', 'ignore': ['lm_head']}
"""

from quantport_transformers.config import QuantportConfig
from quantport_transformers.quantizer import QuantportQuantizer
from quantport_transformers.register import register

register()

__all__ = ["QuantportConfig", "QuantportQuantizer", "register"]
