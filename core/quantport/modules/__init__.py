"""Modules that hold packed weights and one bound kernel. They choose nothing."""

from quantport.modules.base import QuantModule
from quantport.modules.embedding import QuantEmbedding, TiedLinear
from quantport.modules.expert_form import ExpertForm, expert_form
from quantport.modules.experts import QuantExperts
from quantport.modules.linear import QuantFused, QuantLinear

__all__ = [
    "ExpertForm",
    "QuantEmbedding",
    "QuantExperts",
    "QuantFused",
    "QuantLinear",
    "QuantModule",
    "TiedLinear",
    "expert_form",
]
