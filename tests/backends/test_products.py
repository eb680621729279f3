"""Names of products resolve to the architectures that their vendors give them."""

from __future__ import annotations

import pytest

from quantport.errors import DeviceError
from quantport.plugins.device_names import squeezed
from quantport.plugins.registry import default_registry

NAMES = {
    "a100": "cuda:sm_80",
    "NVIDIA A100-SXM4-80GB": "cuda:sm_80",
    "NVIDIA A100 80GB PCIe": "cuda:sm_80",
    "Tesla V100-SXM2-16GB": "cuda:sm_70",
    "Tesla T4": "cuda:sm_75",
    "RTX 4090": "cuda:sm_89",
    "NVIDIA GeForce RTX 4090": "cuda:sm_89",
    "rtx4070tisuper": "cuda:sm_89",
    "NVIDIA GeForce RTX 3080 Laptop GPU": "cuda:sm_86",
    "NVIDIA H100 80GB HBM3": "cuda:sm_90",
    "h100": "cuda:sm_90",
    "l40s": "cuda:sm_89",
    "B200": "cuda:sm_100",
    "RTX 5090": "cuda:sm_120",
    "DGX Spark": "cuda:sm_121",
    "RTX 4000 SFF Ada": "cuda:sm_89",
    "Quadro RTX 4000": "cuda:sm_75",
    "cuda:a100": "cuda:sm_80",
    "mi300x": "rocm:gfx942",
    "AMD Instinct MI300X": "rocm:gfx942",
    "MI355X": "rocm:gfx950",
    "AMD Radeon RX 7900 XTX": "rocm:gfx1100",
    "RX 7800 XT": "rocm:gfx1101",
    "Radeon AI PRO R9700": "rocm:gfx1201",
    "Strix Halo": "rocm:gfx1151",
    "Arc B580": "xpu:bmg",
    "Intel Arc A770": "xpu:arc_a",
    "Intel Data Center GPU Max 1550": "xpu:pvc",
    "Arc B390": "xpu:ptl",
    "910b3": "npu:ascend910b",
    "Ascend910B2": "npu:ascend910b",
    "Ascend910_9391": "npu:ascend910c",
    "Huawei Ascend 950PR": "npu:ascend950",
    "gfx942": "rocm:gfx942",
    "SM_90": "cuda:sm_90",
    "x86_amx": "cpu:x86_amx",
}


@pytest.mark.parametrize("name", NAMES)
def test_products(name):
    device = default_registry().device(name)
    assert (str(device), device.simulated) == (NAMES[name], True)


@pytest.mark.parametrize(
    "name", ["gaudi", "Gaudi 3", "RTX 6000", "RTX 4000", "910A", "A1000", "M1 Max", "TPU v5"]
)
def test_what_nobody_knows_is_said_so(name):
    with pytest.raises(DeviceError, match="none knows an architecture or a product") as caught:
        default_registry().device(name)
    assert "cuda" in caught.value.suggestion


def test_no_product_of_another_kind():
    with pytest.raises(DeviceError, match="cuda has no architecture and no product 'mi300x'"):
        default_registry().device("cuda:mi300x")


def test_no_name_stands_for_two_architectures():
    backends = default_registry().backends.values()
    pairs = {
        (squeezed(name), arch) for b in backends for name, arch in (*b.archs.items(), *b.products.items())
    }
    names = [name for name, _ in pairs]
    assert len(names) == len(set(names))
    assert "" not in names
    assert all(arch.kind == b.kind for b in backends for arch in b.products.values())
