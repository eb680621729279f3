"""All that a backend author may import. Nothing here is defined here.

Example:
    >>> from quantport.backend import Arch, Backend, Device, hookimpl
"""

from quantport import aten, numerics
from quantport.capability import (
    Accepted,
    Claim,
    Evidence,
    MachineCode,
    Measurement,
    Reason,
    Refusal,
    Rejected,
    Status,
    Verdict,
)
from quantport.device import Arch, Device
from quantport.errors import BackendError, DeviceError, QuantportError
from quantport.formats import FORMATS, Format
from quantport.hookspecs import Backend, hookimpl
from quantport.kernel import Canonical, Kernel, Packed, Request, WeightSpec
from quantport.once import once
from quantport.scheme import Quant, Scheme
from quantport.stacked import StackedKernel

__all__ = [
    "FORMATS",
    "Accepted",
    "Arch",
    "Backend",
    "BackendError",
    "Canonical",
    "Claim",
    "Device",
    "DeviceError",
    "Evidence",
    "Format",
    "Kernel",
    "MachineCode",
    "Measurement",
    "Packed",
    "Quant",
    "QuantportError",
    "Reason",
    "Refusal",
    "Rejected",
    "Request",
    "Scheme",
    "StackedKernel",
    "Status",
    "Verdict",
    "WeightSpec",
    "aten",
    "hookimpl",
    "numerics",
    "once",
]
