"""Schemes: the numbers that weights and activations become, as data."""

from quantport.scheme.quant import Quant
from quantport.scheme.scheme import Scheme
from quantport.scheme.solver import Solver, Stats

__all__ = ["Quant", "Scheme", "Solver", "Stats"]
