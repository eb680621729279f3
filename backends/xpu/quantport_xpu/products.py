"""Which architecture a product has: Intel's hardware table
(https://dgpu-docs.intel.com/devices/hardware-table.html). Arc B390 and B370 are of Panther Lake, not of
Battlemage as their letter suggests (pci-ids, vendor 8086, devices b080 to b08f).
"""

from __future__ import annotations

from quantport.backend import Arch
from quantport_xpu.capabilities import ARCHS

_ARC = {
    "arc_a": ("A770", "A750", "A580", "A380", "A310", "A770M", "A730M", "A550M", "A370M", "A350M"),
    "bmg": ("B580", "B570"),
    "lnl": ("140V", "130V"),
    "ptl": ("B390", "B370"),
}
_OTHERS = {
    "pvc": (
        *("Data Center GPU Max 1550", "Data Center GPU Max 1450", "Data Center GPU Max 1100"),
        *(
            "GPU Max 1550",
            "GPU Max 1450",
            "GPU Max 1100",
            "Max 1550",
            "Max 1450",
            "Max 1100",
            "Ponte Vecchio",
        ),
    ),
    "arc_a": (
        *("Data Center GPU Flex 170", "Data Center GPU Flex 140", "GPU Flex 170", "GPU Flex 140"),
        *("Flex 170", "Flex 140", "Arc Pro A60", "Arc Pro A50", "Arc Pro A40"),
    ),
    "bmg": ("Arc Pro B50", "Arc Pro B60", "Arc Pro B70", "Battlemage"),
    "lnl": (
        *("Core Ultra 9 288V", "Core Ultra 7 268V", "Core Ultra 7 266V", "Core Ultra 7 258V"),
        *("Core Ultra 7 256V", "Core Ultra 5 238V", "Core Ultra 5 236V", "Core Ultra 5 228V"),
        *("Core Ultra 5 226V", "Lunar Lake"),
    ),
    "ptl": ("Arc Pro B390", "Arc Pro B370", "Panther Lake"),
}


def _products() -> dict[str, Arch]:
    names = [(f"{brand}{n}", a) for a, group in _ARC.items() for n in group for brand in ("", "Arc ")]
    names += [(name, arch) for arch, group in _OTHERS.items() for name in group]
    return {f"{vendor}{name}": ARCHS[arch] for vendor in ("", "Intel ") for name, arch in names}


PRODUCTS = _products()
