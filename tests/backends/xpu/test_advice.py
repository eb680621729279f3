"""What ``quantport doctor`` says of an Intel GPU that is here but cannot be used, with fakes of everything
that is read.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from quantport.cli.doctor import doctor_page, examine
from quantport_xpu.advice import Surroundings, advice
from quantport_xpu.kernels.triton import backend_reason

INDEX = "--index-url https://download.pytorch.org/whl/xpu"


def fake_torch(xpu="20260000", available=False):
    return SimpleNamespace(
        __version__="2.13.0+fake",
        version=SimpleNamespace(xpu=xpu),
        xpu=SimpleNamespace(is_available=lambda: available),
    )


def make_node(drm, name, vendor="0x8086"):
    (drm / name / "device").mkdir(parents=True)
    (drm / name / "device" / "vendor").write_text(f"{vendor}\n")


@pytest.fixture
def drm(tmp_path):
    make_node(tmp_path, "renderD128", "0x10de")
    (tmp_path / "renderD130").mkdir()
    make_node(tmp_path, "renderD129")
    return tmp_path


def surroundings(
    drm, libraries=("ze_loader", "ze_intel_gpu"), opens=True, environ=(), lacking=(), triton="", package=""
):
    return Surroundings(
        drm,
        lambda name: f"lib{name}.so.1" if name in libraries else None,
        lambda path: opens,
        dict(environ),
        lambda name: name not in lacking,
        lambda: triton,
        lambda: package,
    )


def test_no_intel_gpu_needs_no_advice(tmp_path):
    make_node(tmp_path, "renderD128", "0x10de")
    for folder in (tmp_path, tmp_path / "none"):
        assert advice(fake_torch(xpu=None), surroundings(folder)) == ()
        assert advice(fake_torch(), surroundings(folder, libraries=())) == ()


def test_a_torch_without_xpu_is_replaced(drm):
    (line,) = advice(fake_torch(xpu=None), surroundings(drm))
    assert "/dev/dri/renderD129" in line
    assert f"pip install --force-reinstall torch {INDEX}" in line
    (line,) = advice(SimpleNamespace(__version__="2.8.0", version=SimpleNamespace()), surroundings(drm))
    assert f"pip install --force-reinstall torch {INDEX}" in line


@pytest.mark.parametrize(
    ("found", "cause", "command"),
    [
        (
            {"libraries": ()},
            "Level Zero loader (libze_loader) is missing",
            "sudo apt install libze1 libze-intel-gpu1",
        ),
        ({"opens": False}, "may not open /dev/dri/renderD129", "sudo usermod -aG render $USER"),
        ({"environ": {"ZE_AFFINITY_MASK": "1"}}, "ZE_AFFINITY_MASK=1 may hide it", "unset ZE_AFFINITY_MASK"),
        (
            {"environ": {"ONEAPI_DEVICE_SELECTOR": "opencl:*"}},
            "ONEAPI_DEVICE_SELECTOR=opencl:* may",
            "unset ONEAPI_DEVICE_SELECTOR",
        ),
        ({"libraries": ("ze_loader",)}, "(libze_intel_gpu)", "sudo apt install libze1 libze-intel-gpu1"),
        ({}, "driver may be older", "sudo apt update && sudo apt install libze1 libze-intel-gpu1"),
        ({}, "on Ubuntu 24.04", "sudo add-apt-repository -y ppa:kobuk-team/intel-graphics"),
    ],
)
def test_a_torch_that_sees_no_gpu(drm, found, cause, command):
    (line,) = advice(fake_torch(), surroundings(drm, **found))
    assert "torch 2.13.0+fake (XPU 20260000) does not see it" in line
    assert cause in line
    assert command in line


def test_a_gpu_that_is_used_well_needs_no_advice(drm):
    assert advice(fake_torch(available=True), surroundings(drm)) == ()


@pytest.mark.parametrize(
    ("found", "cause", "command"),
    [
        (
            {"lacking": ("_int_mm", "_scaled_mm")},
            "no aten::_int_mm, aten::_scaled_mm on XPU",
            f"pip install --upgrade torch {INDEX}",
        ),
        ({"triton": "the package triton is not installed: do this"}, "triton is not installed", "do this"),
        (
            {"package": "ImportError: libsycl.so.9"},
            "does not load (ImportError: libsycl.so.9)",
            "pip install --upgrade vllm-xpu-kernels",
        ),
    ],
)
def test_what_is_missing_beside_a_torch_that_sees_the_gpu(drm, found, cause, command):
    (line,) = advice(fake_torch(available=True), surroundings(drm, **found))
    assert cause in line
    assert command in line


def test_triton_for_intel_gpus_is_told_from_other_builds(tmp_path, monkeypatch):
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("quantport_xpu.kernels.triton.find_spec", lambda name: found)
    (tmp_path / "backends" / "nvidia").mkdir(parents=True)
    assert "has no backend for Intel GPUs" in backend_reason()
    assert f"pip install --force-reinstall triton-xpu {INDEX}" in backend_reason()
    (tmp_path / "backends" / "intel").mkdir()
    assert backend_reason() == ""
    monkeypatch.setattr("quantport_xpu.kernels.triton.find_spec", lambda name: None)
    assert "is not installed" in backend_reason()


def test_the_doctor_says_it(drm, monkeypatch):
    monkeypatch.setattr("quantport_xpu.advice.Surroundings", lambda: surroundings(drm))
    monkeypatch.setattr("quantport_xpu.detect.torch", fake_torch(xpu=None))
    said = doctor_page(examine()).data["advice"]["xpu"]
    assert any("/dev/dri/renderD129" in line and INDEX in line for line in said)
