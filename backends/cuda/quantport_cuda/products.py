"""Which architecture a product has: NVIDIA's page "CUDA GPU Compute Capability"
(https://developer.nvidia.com/cuda-gpus). Names that stand for several generations (RTX 4000, RTX 6000) are
left out.
"""

from __future__ import annotations

from quantport.backend import Arch
from quantport_cuda.capabilities import ARCHS

_DATA_CENTER = {
    "sm_70": ("V100",),
    "sm_75": ("T4",),
    "sm_80": ("A100", "A30"),
    "sm_86": ("A2", "A10", "A16", "A40"),
    "sm_89": ("L4", "L40", "L40S"),
    "sm_90": ("H100", "H200", "GH200"),
    "sm_100": ("B200", "GB200"),
    "sm_103": ("B300", "GB300"),
    "sm_121": ("GB10", "DGX Spark"),
}
_FORMS = ("", " SXM", " SXM2", " SXM4", " SXM5", " PCIe", " NVL", " HBM3")
_GEFORCE = {
    "sm_75": ("2080 Ti", "2080 SUPER", "2080", "2070 SUPER", "2070", "2060 SUPER", "2060"),
    "sm_86": ("3090 Ti", "3090", "3080 Ti", "3080", "3070 Ti", "3070", "3060 Ti", "3060", "3050 Ti", "3050"),
    "sm_89": (
        *("4090", "4080 SUPER", "4080", "4070 Ti SUPER", "4070 Ti", "4070 SUPER", "4070"),
        *("4060 Ti", "4060", "4050"),
    ),
    "sm_120": ("5090", "5080", "5070 Ti", "5070", "5060 Ti", "5060", "5050"),
}
_WORKSTATION = {
    "sm_70": ("Quadro GV100", "TITAN V"),
    "sm_75": ("Quadro RTX 8000", "Quadro RTX 6000", "Quadro RTX 5000", "Quadro RTX 4000", "TITAN RTX"),
    "sm_86": ("RTX A6000", "RTX A5000", "RTX A4000", "RTX A3000", "RTX A2000"),
    "sm_89": (
        *("RTX 6000 Ada", "RTX 5000 Ada", "RTX 4500 Ada", "RTX 4000 Ada", "RTX 4000 SFF Ada", "RTX 2000 Ada"),
        *("RTX 6000 Ada Generation", "RTX 5000 Ada Generation", "RTX 4000 Ada Generation"),
    ),
    "sm_120": (
        *("RTX PRO 6000", "RTX PRO 5000", "RTX PRO 4500", "RTX PRO 4000", "RTX PRO 2000"),
        *(
            "RTX PRO 6000 Blackwell",
            "RTX PRO 5000 Blackwell",
            "RTX PRO 4500 Blackwell",
            "RTX PRO 4000 Blackwell",
        ),
        *("RTX PRO 2000 Blackwell", "RTX PRO 6000 Blackwell Workstation Edition"),
        *("RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell Max-Q Workstation Edition"),
    ),
}


def _products() -> dict[str, Arch]:
    names = [
        (f"{name}{form}", arch) for arch, group in _DATA_CENTER.items() for name in group for form in _FORMS
    ]
    names += [(f"Tesla {name}", arch) for name, arch in names if arch in ("sm_70", "sm_75")]
    for arch, group in _GEFORCE.items():
        for name in group:
            names += [
                (f"{brand}RTX {name}{form}", arch)
                for brand in ("", "GeForce ")
                for form in ("", " Laptop", " Laptop GPU")
            ]
    names += [(name, arch) for arch, group in _WORKSTATION.items() for name in group]
    return {f"{vendor}{name}": ARCHS[arch] for vendor in ("", "NVIDIA ") for name, arch in names}


PRODUCTS = _products()
