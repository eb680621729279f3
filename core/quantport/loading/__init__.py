"""Loading: the only room of the house with side effects on a model."""

from quantport.loading.compiled_step import compile_decode
from quantport.loading.load_model import load
from quantport.loading.plan_model import plan
from quantport.loading.quantize_checkpoint import quantize_checkpoint
from quantport.loading.quantize_model import quantize_
from quantport.loading.save_model import save
from quantport.loading.update import update_weight

__all__ = ["compile_decode", "load", "plan", "quantize_", "quantize_checkpoint", "save", "update_weight"]
