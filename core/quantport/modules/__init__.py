"""Modules that hold packed weights and one bound kernel. They choose nothing."""

from quantport.modules.base import QuantModule
from quantport.modules.embedding import QuantEmbedding, TiedLinear
from quantport.modules.experts import QuantExperts, activation_name, why_not_experts
from quantport.modules.linear import QuantFused, QuantLinear

__all__ = [
    "QuantEmbedding",
    "QuantExperts",
    "QuantFused",
    "QuantLinear",
    "QuantModule",
    "TiedLinear",
    "activation_name",
    "why_not_experts",
]
