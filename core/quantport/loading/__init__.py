"""Loading: the only room of the house with side effects on a model."""

from quantport.loading.load import load
from quantport.loading.memory import quantize_
from quantport.loading.planning import plan
from quantport.loading.save import save

__all__ = ["load", "plan", "quantize_", "save"]
