"""Detection of Intel GPUs, against fakes of the torch module."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from quantport_xpu import vendor
from quantport_xpu.capabilities import ARCHS
from quantport_xpu.detect import XpuBackend, devices

GIB = 1 << 30
NUMBERS = {
    "pvc": (0x30F000700, 0x30F400700),
    "arc_a": (0x30DC00800, 0x30E000500, 0x30E400000),
    "bmg": (0x500400400, 0x500800000),
    "lnl": (0x501000400,),
    "ptl": (0x780000400, 0x780400100, 0x780C00000, 0x781000400, 0x781400400),
    "xe3p": (0x8C2800000,),
}


def operator(name):
    return SimpleNamespace(
        default=SimpleNamespace(_schema=torch._C.parse_schema(name + vendor.SCHEMAS[f"_xpu_C.{name}"]))
    )


def fake_torch(*numbers, xpu="20260000", available=True, xmx=True, operators=()):
    boxes = [
        SimpleNamespace(
            name=f"Intel fake {i}",
            total_memory=(i + 1) * GIB,
            architecture=n,
            has_subgroup_matrix_multiply_accumulate=xmx,
        )
        for i, n in enumerate(numbers)
    ]
    return SimpleNamespace(
        __version__="2.13.0+fake",
        ops=SimpleNamespace(_xpu_C=SimpleNamespace(**{name: operator(name) for name in operators})),
        version=SimpleNamespace(xpu=xpu),
        xpu=SimpleNamespace(
            is_available=lambda: available,
            device_count=lambda: len(numbers),
            get_device_properties=lambda i: boxes[i],
        ),
    )


def test_every_architecture_has_a_number():
    assert NUMBERS.keys() == ARCHS.keys()


@pytest.mark.parametrize(
    ("name", "number"), [(name, n) for name, numbers in NUMBERS.items() for n in numbers]
)
def test_every_architecture_is_found(name, number):
    (found,) = devices(fake_torch(number))
    assert found.arch is ARCHS[name]
    assert (found.kind, found.torch_type, found.memory, found.name) == ("xpu", "xpu", GIB, "Intel fake 0")
    assert found.torch_device == torch.device("xpu", 0)


def test_several_gpus_keep_their_index():
    assert [str(d) for d in devices(fake_torch(0x500400400, 0x30DC00800))] == ["xpu:0 (bmg)", "xpu:1 (arc_a)"]


@pytest.mark.parametrize(("xmx", "native"), [(True, {"fp16", "bf16"}), (False, {"fp16"})])
def test_an_unknown_number_is_a_device_with_safe_facts(xmx, native):
    arch = devices(fake_torch(0x900000000, xmx=xmx))[0].arch
    assert (arch.name, arch.title, arch.native) == ("xe_0x900000000", "unknown Intel architecture", native)
    assert "assumed" in arch.source


def test_torch_without_xpu_finds_nothing():
    assert devices(SimpleNamespace()) == ()
    assert devices(fake_torch(0x500400400, available=False)) == ()


def test_a_broken_driver_raises():
    lib = fake_torch(0x500400400)

    def broken(i):
        raise RuntimeError("level_zero backend failed")

    lib.xpu.get_device_properties = broken
    with pytest.raises(RuntimeError, match="level_zero"):
        devices(lib)


@pytest.mark.skipif(torch.xpu.is_available(), reason="an Intel GPU is here")
def test_the_backend_on_this_machine_finds_nothing():
    assert tuple(XpuBackend().detect()) == ()


def test_operators_of_the_vendor_are_features(monkeypatch):
    lib = fake_torch(0x500400400, operators=["fp8_gemm_w8a16"])
    monkeypatch.setattr(vendor, "load", lambda: "")
    assert devices(lib)[0].features == {"_xpu_C.fp8_gemm_w8a16"}
    assert devices(fake_torch(0x500400400))[0].features == frozenset()
