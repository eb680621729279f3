"""Which architecture a product has: the names of SoCs in torch_npu (Ascend/pytorch
torch_npu/csrc/core/npu/NpuVariables.h at 9e73e708a, as in ``capabilities``), and the series that they are of.
"""

from __future__ import annotations

from quantport.backend import Arch
from quantport_npu.capabilities import ARCHS

_SOCS = {
    "ascend310p": ("310P", "310P1", "310P2", "310P3", "310P4", "310P5", "310P7"),
    "ascend910b": ("910B", "910B1", "910B2", "910B2C", "910B3", "910B4", "910B4-1", "Atlas A2"),
    "ascend910c": (
        *("910C", "910_9391", "910_9392", "910_9381", "910_9382", "910_9372", "910_9362", "910_9363"),
        "Atlas A3",
    ),
    "ascend950": ("950", "950PR", "950DT", "950PR_9579", "950DT_9591"),
}
PRODUCTS: dict[str, Arch] = {
    f"{vendor}{name}": ARCHS[arch]
    for arch, names in _SOCS.items()
    for name in names
    for vendor in ("", "Ascend", "Huawei Ascend ")
}
