"""What ``quantport doctor`` says of an NVIDIA GPU that is here but cannot be used, with fakes of everything
that is read.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from quantport_cuda.advice import Surroundings, advice, gpus, runs

ARCH_LIST = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
VERSION = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (root)\nGCC version: "
    "13.3.0\n"
)


def fake_torch(*capabilities, cuda="13.0", available=True):
    return SimpleNamespace(
        __version__="2.13.0+fake",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: available,
            device_count=lambda: len(capabilities),
            get_device_capability=lambda i: capabilities[i],
            get_arch_list=lambda: list(ARCH_LIST),
        ),
    )


@pytest.fixture
def make(tmp_path):
    """Surroundings with a driver of some version or none, and PCI devices as (vendor, class)."""

    def surroundings(version="580.95.05", pci=(), smi=None, triton=""):
        for i, (vendor, kind) in enumerate(pci):
            folder = tmp_path / "pci" / f"0000:0{i}:00.0"
            folder.mkdir(parents=True)
            (folder / "vendor").write_text(f"{vendor}\n")
            (folder / "class").write_text(f"{kind}\n")
        driver = tmp_path / "version"
        if version:
            driver.write_text(VERSION.format(version))
        return Surroundings(driver, tmp_path / "pci", lambda name: smi, lambda: triton)

    return surroundings


def test_a_cpu_build_is_replaced(make):
    (line,) = advice(fake_torch(cuda=None), make())
    assert "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130" in line
    assert "2.13.0+fake" in line


def test_nvidia_smi_shows_a_driver_too(make):
    assert (
        "built without CUDA" in advice(fake_torch(cuda=None), make(version="", smi="/usr/bin/nvidia-smi"))[0]
    )


def test_a_gpu_without_a_driver(make):
    here = make(version="", pci=[("0x8086", "0x030000"), ("0x10de", "0x040300"), ("0x10de", "0x030200")])
    assert gpus(here.pci) == ("0000:02:00.0",)
    (line,) = advice(fake_torch(cuda=None), here)
    assert "(PCI 0000:02:00.0), but not its driver: sudo ubuntu-drivers install" in line


def test_nothing_is_said_without_a_gpu_and_when_all_is_well(make):
    assert advice(fake_torch(cuda=None), make(version="", pci=[("0x8086", "0x030000")])) == ()
    assert advice(fake_torch((9, 0), (8, 9), (10, 3)), make()) == ()


@pytest.mark.parametrize(
    ("version", "cuda", "said"),
    [
        (
            "550.54.14",
            "13.0",
            "its driver is 550, and this CUDA wants 580 or later: sudo ubuntu-drivers install",
        ),
        ("470.256.02", "12.8", "its driver is 470, and this CUDA wants 525 or later"),
        ("580.95.05", "13.0", "CUDA_VISIBLE_DEVICES"),
        ("550.54.14", "12.8", "CUDA_VISIBLE_DEVICES"),
        ("", "13.0", "if the driver is older than this CUDA"),
    ],
)
def test_a_torch_that_sees_no_gpu(make, version, cuda, said):
    (line,) = advice(fake_torch(cuda=cuda, available=False), make(version, smi="/usr/bin/nvidia-smi"))
    assert "sees no GPU" in line
    assert said in line
    assert (
        'pip install --force-reinstall "torch<2.15" --index-url https://download.pytorch.org/whl/cu126'
        in line
    )


def test_a_gpu_without_machine_code(make):
    (line,) = advice(fake_torch((9, 0), (7, 0)), make())
    assert "cuda:1 (sm_70)" in line
    assert "cu126" in line


def test_a_torch_without_triton(make):
    (line,) = advice(
        fake_torch((9, 0)), make(triton="the package triton is not installed: pip install triton")
    )
    assert "triton is not installed: pip install triton" in line


@pytest.mark.parametrize(
    ("entry", "capability", "expected"),
    [
        ("sm_80", (8, 6), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False),
        ("sm_100f", (10, 3), True),
        ("compute_80", (13, 0), True),
        ("compute_120", (9, 0), False),
    ],
)
def test_which_machine_code_runs(entry, capability, expected):
    assert runs(entry, capability) is expected
