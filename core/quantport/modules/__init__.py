"""Modules that hold packed weights and one bound kernel. They choose nothing."""

from quantport.modules.base import QuantModule
from quantport.modules.experts import QuantExperts, activation_name, why_not_experts
from quantport.modules.linear import QuantLinear

__all__ = ["QuantExperts", "QuantLinear", "QuantModule", "activation_name", "why_not_experts"]
