"""Detection of AMD GPUs, against fakes of the torch module."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from quantport_rocm.capabilities import ARCHS
from quantport_rocm.detect import RocmBackend, advice, devices

GIB = 1 << 30


def fake_torch(*gcn, hip="7.2.26015-fc0010cf6a", cuda=None, available=True):
    boxes = [
        SimpleNamespace(name=f"AMD fake {i}", total_memory=(i + 1) * GIB, gcnArchName=name)
        for i, name in enumerate(gcn)
    ]
    return SimpleNamespace(
        __version__="2.13.0+fake",
        version=SimpleNamespace(cuda=cuda, hip=hip),
        cuda=SimpleNamespace(
            is_available=lambda: available,
            device_count=lambda: len(gcn),
            get_device_properties=lambda i: boxes[i],
        ),
    )


@pytest.mark.parametrize("suffix", ["", ":sramecc+:xnack-"])
@pytest.mark.parametrize("name", ARCHS)
def test_every_architecture_is_found(name, suffix):
    (found,) = devices(fake_torch(name + suffix))
    assert found.arch is ARCHS[name]
    assert (found.kind, found.torch_type, found.memory, found.name) == ("rocm", "cuda", GIB, "AMD fake 0")
    assert found.torch_device == torch.device("cuda", 0)


def test_several_gpus_keep_their_index():
    assert [str(d) for d in devices(fake_torch("gfx90a", "gfx1100"))] == [
        "rocm:0 (gfx90a)",
        "rocm:1 (gfx1100)",
    ]


@pytest.mark.parametrize("early", ["gfx940", "gfx941:sramecc+:xnack-"])
def test_early_names_of_gfx942(early):
    assert devices(fake_torch(early))[0].arch is ARCHS["gfx942"]


@pytest.mark.parametrize(
    ("name", "same"),
    [
        *((n, "gfx1100") for n in ("gfx1101", "gfx1102", "gfx1103")),
        *((n, "gfx1151") for n in ("gfx1150", "gfx1152", "gfx1153")),
    ],
)
def test_siblings_have_the_same_facts_under_their_own_name(name, same):
    arch = devices(fake_torch(name))[0].arch
    assert (arch.name, arch.native, arch.family) == (name, ARCHS[same].native, ARCHS[same].family)


@pytest.mark.parametrize("name", ["gfx906", "gfx1030", "gfx1250", "gfx1300", ""])
def test_an_unknown_name_is_a_device_with_safe_facts(name):
    arch = devices(fake_torch(f"{name}:xnack-"))[0].arch
    assert (arch.name, arch.title, arch.native) == (name, "unknown AMD architecture", {"fp16"})
    assert "assumed" in arch.source


@pytest.mark.parametrize(
    ("hip", "expected"), [("6.4.43483-a187df25c", set()), ("6.5.0", {"rocm>=6.5"}), ("7.2.1", {"rocm>=6.5"})]
)
def test_the_build_of_torch_is_a_feature(hip, expected):
    assert devices(fake_torch("gfx950", hip=hip))[0].features == expected


def test_torch_without_rocm_finds_nothing_and_asks_no_driver():
    assert devices(SimpleNamespace(version=SimpleNamespace(hip=None))) == ()
    assert devices(fake_torch("gfx950", hip=None, cuda="13.0")) == ()
    assert devices(fake_torch("gfx950", available=False)) == ()


def test_a_broken_driver_raises():
    lib = fake_torch("gfx950")

    def broken(i):
        raise RuntimeError("HIP error: no ROCm-capable device")

    lib.cuda.get_device_properties = broken
    with pytest.raises(RuntimeError, match="HIP error"):
        devices(lib)


@pytest.mark.skipif(torch.version.hip is not None, reason="this torch is built for ROCm")
def test_the_backend_on_this_machine_finds_nothing():
    assert tuple(RocmBackend().detect()) == ()


def test_advice(tmp_path):
    kfd, pci = tmp_path / "kfd", tmp_path / "pci"
    assert advice(fake_torch(hip=None), kfd, pci) == ()
    for name, vendor, kind in (
        ("0", "0x8086", "0x030000"),
        ("1", "0x1002", "0x040300"),
        ("2", "0x1002", "0x038000"),
    ):
        (pci / name).mkdir(parents=True)
        (pci / name / "vendor").write_text(f"{vendor}\n")
        (pci / name / "class").write_text(f"{kind}\n")
    (line,) = advice(fake_torch(hip=None), kfd, pci)
    assert "(PCI 2), but not its driver" in line
    assert "sudo modprobe amdgpu" in line
    kfd.touch()
    (line,) = advice(fake_torch(hip=None), kfd, pci)
    assert "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/rocm" in line
    (line,) = advice(fake_torch(available=False), kfd, pci, lambda path: False)
    assert "sees no GPU: you may not open" in line
    assert "sudo usermod -aG render,video $USER" in line
    (line,) = advice(fake_torch(available=False), kfd, pci, lambda path: True)
    assert "unset HIP_VISIBLE_DEVICES" in line
    assert advice(fake_torch("gfx942"), kfd, pci) == ()
