"""Which architecture a product has: LLVM's docs/AMDGPUUsage.rst, table of processors, and AMD's page "AMD GPU
specifications" (https://rocm.docs.amd.com/en/latest/reference/gpu-arch-specs.html).
"""

from __future__ import annotations

from quantport.backend import Arch
from quantport_rocm.capabilities import arch_of

_INSTINCT = {
    "gfx908": ("MI100",),
    "gfx90a": ("MI210", "MI250", "MI250X"),
    "gfx942": ("MI300", "MI300A", "MI300X", "MI325X"),
    "gfx950": ("MI350X", "MI355X"),
}
_RADEON = {
    "gfx1100": ("RX 7900 XTX", "RX 7900 XT", "RX 7900 GRE", "PRO W7900", "PRO W7800"),
    "gfx1101": ("RX 7800 XT", "RX 7700 XT", "PRO W7700"),
    "gfx1102": ("RX 7600 XT", "RX 7600", "PRO W7600", "PRO W7500"),
    "gfx1151": ("8060S", "8050S"),
    "gfx1200": ("RX 9060 XT", "RX 9060"),
    "gfx1201": ("RX 9070 XT", "RX 9070", "RX 9070 GRE", "AI PRO R9700"),
}
_RYZEN = ("Ryzen AI Max+ 395", "Ryzen AI Max+ PRO 395", "Ryzen AI Max 390", "Ryzen AI Max 385", "Strix Halo")


def _products() -> dict[str, Arch]:
    names = [
        (f"{brand}{n}", a) for a, group in _INSTINCT.items() for n in group for brand in ("", "Instinct ")
    ]
    names += [(f"{brand}{n}", a) for a, group in _RADEON.items() for n in group for brand in ("", "Radeon ")]
    names += [(name, "gfx1151") for name in _RYZEN]
    return {f"{vendor}{name}": arch_of(gfx) for vendor in ("", "AMD ") for name, gfx in names}


PRODUCTS = _products()
