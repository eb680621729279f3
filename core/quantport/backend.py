"""All that a backend author may import. Nothing here is defined here.

Example:
    >>> from quantport.backend import Arch, Backend, Device, hookimpl
"""

from quantport import numerics
from quantport.device import Arch, Device
from quantport.errors import BackendError, DeviceError, QuantportError
from quantport.kernels import aten
from quantport.kernels.allocate import empty_weight
from quantport.kernels.base import (
    CodedRows,
    Kernel,
    Packed,
    PackedLayout,
    PackedTensor,
    Request,
    RowFunction,
    StoredWeight,
    WeightSpec,
)
from quantport.kernels.grouped import ACTIVATIONS, GroupedKernel, loop_over_groups
from quantport.kernels.own_speeds import cache_folder
from quantport.kernels.tuned import Tuned, find_tuned
from quantport.kernels.verdict import (
    Accepted,
    Claim,
    Evidence,
    MachineCode,
    Measurement,
    Reason,
    ReasonCode,
    Refusal,
    Rejected,
    Status,
    Verdict,
)
from quantport.kvcache.kernel import KVKernel
from quantport.plugins.hookspecs import Backend, hookimpl
from quantport.plugins.once import once
from quantport.scheme import Quant, Scheme, Solver, Stats
from quantport.scheme.formats import FORMATS, Format

Canonical = StoredWeight  # the name that it had

__all__ = [
    "ACTIVATIONS",
    "FORMATS",
    "Accepted",
    "Arch",
    "Backend",
    "BackendError",
    "Claim",
    "CodedRows",
    "Device",
    "DeviceError",
    "Evidence",
    "Format",
    "GroupedKernel",
    "KVKernel",
    "Kernel",
    "MachineCode",
    "Measurement",
    "Packed",
    "PackedLayout",
    "PackedTensor",
    "Quant",
    "QuantportError",
    "Reason",
    "ReasonCode",
    "Refusal",
    "Rejected",
    "Request",
    "RowFunction",
    "Scheme",
    "Solver",
    "Stats",
    "Status",
    "StoredWeight",
    "Tuned",
    "Verdict",
    "WeightSpec",
    "aten",
    "cache_folder",
    "empty_weight",
    "find_tuned",
    "hookimpl",
    "loop_over_groups",
    "numerics",
    "once",
]
