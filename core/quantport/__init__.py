"""quantport quantizes BF16/FP16 models while they load, on whatever accelerator it finds.

Example:
    >>> import quantport
    >>> model = quantport.load("path/or/id", scheme="int8")  # doctest: +SKIP
    >>> print(model.quantport_plan.device)  # doctest: +SKIP
"""

from __future__ import annotations

from quantport.config import QuantConfig
from quantport.device import Device
from quantport.errors import QuantportError
from quantport.host import host
from quantport.loading import load, plan, quantize_, save
from quantport.matrix import matrix
from quantport.scheme import Scheme, Schemes

__version__ = "0.1.0"


def devices() -> tuple[Device, ...]:
    """Returns every device found, the one that ``device="auto"`` takes first."""
    return host().devices


def __getattr__(name: str) -> Schemes:
    if name == "schemes":  # lazily, since plugins may add schemes
        return host().schemes
    raise AttributeError(f"module 'quantport' has no attribute {name!r}")


__all__ = [
    "Device",
    "QuantConfig",
    "QuantportError",
    "Scheme",
    "devices",
    "load",
    "matrix",
    "plan",
    "quantize_",
    "save",
    "schemes",
]
