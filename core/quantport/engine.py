"""All that an engine or an integration may import. Nothing here is defined here.

In the order of use: read a configuration, find the layers, resolve which scheme each gets, plan which kernel
runs it, quantize and pack its weight (or a shard of it), run it, and put a new weight in its place.

Example:
    >>> from quantport.engine import default_registry, make_plan
"""

from quantport.checkpoint import Checkpoint, CheckpointFormat, QuantizedWeight, Recognized, TensorSource
from quantport.config import QuantConfig
from quantport.config.resolve import Assignment, resolve
from quantport.device import Arch, Device
from quantport.errors import ConfigError, QuantportError, UnsupportedError, WeightError
from quantport.kernels.base import Kernel, Packed, Request, StoredWeight, WeightSpec
from quantport.kernels.grouped import GroupedKernel
from quantport.loading.swap_modules import match_modules, swap_modules
from quantport.loading.update import update_weight
from quantport.model.layers import Layer, Part, find_layers
from quantport.model.roles import Role, SkipCode, SkipReason
from quantport.modules import QuantEmbedding, QuantExperts, QuantFused, QuantLinear, QuantModule
from quantport.modules.handles import BoundWeight, bind
from quantport.modules.ops import run_linear
from quantport.numerics import dequantize_weight, quantize_weight
from quantport.numerics.sharding import alignment, join_shards, quantize_shard, shard_dims
from quantport.planning.plan import Plan, make_plan
from quantport.planning.select_kernel import Choice, select_kernel
from quantport.planning.steps import Step
from quantport.plugins.registry import Registry, default_registry
from quantport.scheme import Quant, Scheme

__all__ = [
    "Arch",
    "Assignment",
    "BoundWeight",
    "Checkpoint",
    "CheckpointFormat",
    "Choice",
    "ConfigError",
    "Device",
    "GroupedKernel",
    "Kernel",
    "Layer",
    "Packed",
    "Part",
    "Plan",
    "Quant",
    "QuantConfig",
    "QuantEmbedding",
    "QuantExperts",
    "QuantFused",
    "QuantLinear",
    "QuantModule",
    "QuantizedWeight",
    "QuantportError",
    "Recognized",
    "Registry",
    "Request",
    "Role",
    "Scheme",
    "SkipCode",
    "SkipReason",
    "Step",
    "StoredWeight",
    "TensorSource",
    "UnsupportedError",
    "WeightError",
    "WeightSpec",
    "alignment",
    "bind",
    "default_registry",
    "dequantize_weight",
    "find_layers",
    "join_shards",
    "make_plan",
    "match_modules",
    "quantize_shard",
    "quantize_weight",
    "resolve",
    "run_linear",
    "select_kernel",
    "shard_dims",
    "swap_modules",
    "update_weight",
]
