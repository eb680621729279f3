"""Diffusers takes quantport as it takes any quantizer: importing this package tells it so.

Example:
    >>> from quantport_diffusers import QuantportConfig
    >>> QuantportConfig("fp8", ignore=["proj_out"]).to_dict()
    {'quant_method': 'quantport', 'scheme': 'fp8_per_tensor', 'ignore': ['proj_out']}
"""

from quantport_diffusers.compare import Comparison, compare
from quantport_diffusers.config import QuantportConfig
from quantport_diffusers.pipelines import PipelineConfig, load_pipeline, plans
from quantport_diffusers.quantizer import QuantportQuantizer
from quantport_diffusers.register import register

register()

__all__ = [
    "Comparison",
    "PipelineConfig",
    "QuantportConfig",
    "QuantportQuantizer",
    "compare",
    "load_pipeline",
    "plans",
    "register",
]
