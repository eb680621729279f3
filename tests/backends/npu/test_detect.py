"""Detection of Ascend NPUs, against fakes of the torch_npu module."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from quantport_npu import detect
from quantport_npu.capabilities import ARCHS
from quantport_npu.detect import NpuBackend, devices, installed

GIB = 1 << 30
NUMBERS = {
    "ascend310p": range(200, 206),
    "ascend910b": range(220, 226),
    "ascend910c": range(250, 257),
    "ascend950": (260,),
}


def fake_torch_npu(soc, name="Ascend910B2", count=1, available=True):
    return SimpleNamespace(
        _C=SimpleNamespace(_npu_get_soc_version=lambda: soc),
        npu=SimpleNamespace(
            is_available=lambda: available,
            device_count=lambda: count,
            get_device_name=lambda i: name,
            get_device_properties=lambda i: SimpleNamespace(total_memory=(i + 1) * GIB),
        ),
    )


def test_every_architecture_has_a_number():
    assert NUMBERS.keys() == ARCHS.keys()


@pytest.mark.parametrize(("name", "soc"), [(name, n) for name, numbers in NUMBERS.items() for n in numbers])
def test_every_architecture_is_found(name, soc):
    (found,) = devices(fake_torch_npu(soc))
    assert found.arch is ARCHS[name]
    assert (found.kind, found.torch_type, found.memory, found.name) == ("npu", "npu", GIB, "Ascend910B2")


def test_several_npus_keep_their_index():
    found = devices(fake_torch_npu(255, "Ascend910_9362", count=2))
    assert [str(d) for d in found] == ["npu:0 (ascend910c)", "npu:1 (ascend910c)"]


@pytest.mark.parametrize(
    ("soc", "name", "arch_name", "native"),
    [
        (300, "Ascend1000", "ascend1000", {"fp16", "bf16"}),
        (241, "Ascend310B2", "ascend310b2", {"fp16", "bf16"}),
        (104, "Ascend910A", "ascend910a", {"fp16"}),
        (-1, "", "soc-1", {"fp16"}),
    ],
)
def test_an_unknown_soc_is_a_device_with_safe_facts(soc, name, arch_name, native):
    (found,) = devices(fake_torch_npu(soc, name))
    assert (found.arch.name, found.arch.title, found.arch.native) == (
        arch_name,
        "unknown Ascend architecture",
        native,
    )
    assert f"SocVersion {soc}" in found.arch.source


def test_no_npu():
    assert devices(fake_torch_npu(220, available=False)) == ()


def test_a_broken_driver_raises():
    lib = fake_torch_npu(220)

    def broken():
        raise RuntimeError("aclInit failed")

    lib._C._npu_get_soc_version = broken
    with pytest.raises(RuntimeError, match="aclInit"):
        devices(lib)


def test_the_backend_does_not_import_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(detect, "installed", lambda: False)
    assert tuple(NpuBackend().detect()) == ()


def test_the_backend_reads_torch_npu_where_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", fake_torch_npu(260, "Ascend950PR_9579"))
    monkeypatch.setattr(detect, "installed", lambda: True)
    assert [str(d) for d in NpuBackend().detect()] == ["npu:0 (ascend950)"]


def test_installed():
    assert installed(lambda name: object())
    assert not installed(lambda name: None)


@pytest.mark.parametrize(("said", "features"), [("8.5.0", {"cann 8.5.0"}), ("", set()), (None, set())])
def test_the_version_of_cann_is_a_feature(said, features):
    lib = fake_torch_npu(220)
    lib.npu.utils = SimpleNamespace(get_cann_version=lambda: said)
    (found,) = devices(lib)
    assert found.features == features


def test_a_version_that_cannot_be_read_is_no_feature():
    lib = fake_torch_npu(220)
    assert devices(lib)[0].features == frozenset()

    def broken():
        raise RuntimeError("no CANN here")

    lib.npu.utils = SimpleNamespace(get_cann_version=broken)
    assert devices(lib)[0].features == frozenset()
