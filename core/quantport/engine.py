"""All that an engine or an integration may import. Nothing here is defined here.

In the order of use: read a configuration, find the layers, resolve which scheme each gets, plan which kernel
runs it, quantize and pack its weight (or a shard of it), run it, and put a new weight in its place.

Example:
    >>> from quantport.engine import default_registry, make_plan
"""

from quantport.checkpoint import (
    Checkpoint,
    CheckpointFormat,
    QuantizedWeight,
    Recognized,
    SavedModel,
    TensorSource,
)
from quantport.config import QuantConfig
from quantport.config.resolve import Assignment, resolve
from quantport.device import Arch, Device
from quantport.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    QuantportError,
    RankError,
    SaveError,
    UnsupportedError,
    WeightError,
)
from quantport.kernels.base import Kernel, Packed, Request, StoredWeight, WeightSpec
from quantport.kernels.grouped import GroupedKernel
from quantport.loading.executor import Progress
from quantport.loading.library_config import METHOD, LibraryConfig, is_marked, merge_or_take_ours
from quantport.loading.partial_load import PartialLoad
from quantport.loading.ranks import Ranks
from quantport.loading.save_model import described_model, why_not_written
from quantport.loading.shards import Shards
from quantport.loading.skeleton import transformers_names
from quantport.loading.swap_modules import match_modules, swap_modules
from quantport.loading.update import update_weight
from quantport.model.layers import Layer, Part, find_layers
from quantport.model.roles import Role, SkipCode, SkipReason
from quantport.modules import QuantEmbedding, QuantExperts, QuantFused, QuantLinear, QuantModule, TiedLinear
from quantport.modules.handles import BoundWeight, bind
from quantport.modules.ops import run_linear
from quantport.numerics import dequantize_weight, quantize_weight
from quantport.numerics.sharding import alignment, join_shards, quantize_shard, shard_dims
from quantport.planning.memory import parse_size
from quantport.planning.plan import Plan, make_plan
from quantport.planning.select_kernel import Choice, select_kernel
from quantport.planning.steps import Step
from quantport.plugins.registry import Registry, default_registry
from quantport.scheme import Quant, Scheme

__all__ = [
    "METHOD",
    "Arch",
    "Assignment",
    "BoundWeight",
    "Checkpoint",
    "CheckpointError",
    "CheckpointFormat",
    "Choice",
    "ConfigError",
    "Device",
    "DeviceError",
    "GroupedKernel",
    "Kernel",
    "Layer",
    "LibraryConfig",
    "Packed",
    "Part",
    "PartialLoad",
    "Plan",
    "Progress",
    "Quant",
    "QuantConfig",
    "QuantEmbedding",
    "QuantExperts",
    "QuantFused",
    "QuantLinear",
    "QuantModule",
    "QuantizedWeight",
    "QuantportError",
    "RankError",
    "Ranks",
    "Recognized",
    "Registry",
    "Request",
    "Role",
    "SaveError",
    "SavedModel",
    "Scheme",
    "Shards",
    "SkipCode",
    "SkipReason",
    "Step",
    "StoredWeight",
    "TensorSource",
    "TiedLinear",
    "UnsupportedError",
    "WeightError",
    "WeightSpec",
    "alignment",
    "bind",
    "default_registry",
    "dequantize_weight",
    "described_model",
    "find_layers",
    "is_marked",
    "join_shards",
    "make_plan",
    "match_modules",
    "merge_or_take_ours",
    "parse_size",
    "quantize_shard",
    "quantize_weight",
    "resolve",
    "run_linear",
    "select_kernel",
    "shard_dims",
    "swap_modules",
    "transformers_names",
    "update_weight",
    "why_not_written",
]
