"""Loading: the only room of the house with side effects on a model."""

from quantport.loading.loader import load
from quantport.loading.memory import quantize_
from quantport.loading.planning import plan
from quantport.loading.saver import save

__all__ = ["load", "plan", "quantize_", "save"]
