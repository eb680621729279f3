"""quantport quantizes BF16/FP16 models while they load, on whatever accelerator it finds.

Example:
    >>> import quantport
    >>> model = quantport.load("path/or/id", scheme="int8")  # doctest: +SKIP
    >>> print(model.quantport_plan.device)  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantport.config import QuantConfig
    from quantport.device import Device
    from quantport.errors import QuantportError
    from quantport.loading import compile_decode, load, plan, quantize_, save
    from quantport.loading.kv_caches import kv_cache
    from quantport.planning.capability_matrix import matrix
    from quantport.plugins.registry import devices
    from quantport.scheme import Scheme
    from quantport.scheme.catalog import Schemes

    schemes: Schemes

__version__ = "0.1.0"

_HOMES = {
    "Device": "quantport.device",
    "QuantConfig": "quantport.config",
    "QuantportError": "quantport.errors",
    "Scheme": "quantport.scheme",
    "compile_decode": "quantport.loading",
    "devices": "quantport.plugins.registry",
    "kv_cache": "quantport.loading.kv_caches",
    "load": "quantport.loading",
    "matrix": "quantport.planning.capability_matrix",
    "plan": "quantport.loading",
    "quantize_": "quantport.loading",
    "save": "quantport.loading",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for on first use (PEP 562): ``import quantport`` by itself costs nothing, not
    even torch.
    """
    if name == "schemes":  # what plugins add included
        return import_module("quantport.plugins.registry").default_registry().schemes
    if name not in _HOMES:
        raise AttributeError(f"module 'quantport' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Device",
    "QuantConfig",
    "QuantportError",
    "Scheme",
    "compile_decode",
    "devices",
    "kv_cache",
    "load",
    "matrix",
    "plan",
    "quantize_",
    "save",
    "schemes",
]
