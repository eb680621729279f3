"""What ``quantport doctor`` says of an Ascend NPU that is here but cannot be used, with fakes of everything
that is read.
"""

from __future__ import annotations

from importlib import metadata

import pytest

from quantport.cli.doctor import doctor_page, examine
from quantport_npu import advice as room
from quantport_npu.advice import Surroundings, advice
from quantport_npu.detect import NpuBackend

TORCH = "2.13.0+cpu"
MATCHING = ("2.13.0", ("torch==2.13.0.*", "numpy"))


@pytest.fixture
def system(tmp_path):
    """A system with an NPU, its driver, CANN and the right torch_npu, except for the arguments."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "davinci0").touch()
    (tmp_path / "ascend" / "driver").mkdir(parents=True)

    def make(package=MATCHING, opens=True):
        return Surroundings(
            tmp_path / "dev", tmp_path / "pci", tmp_path / "ascend", package, lambda name: opens
        )

    return make


def bus(path, vendor="0x19e5", kind="0x120000"):
    (path / "0000:c1:00.0").mkdir(parents=True)
    (path / "0000:c1:00.0" / "vendor").write_text(f"{vendor}\n")
    (path / "0000:c1:00.0" / "class").write_text(f"{kind}\n")


def test_an_npu_that_is_used_needs_no_advice(system):
    assert advice(TORCH, system()) == ()


def test_no_npu_and_no_torch_npu_is_silence(tmp_path):
    assert advice(TORCH, Surroundings(tmp_path, tmp_path, tmp_path, ("", ()), lambda name: False)) == ()
    (tmp_path / "davinci_manager").touch()
    assert advice(TORCH, Surroundings(tmp_path, tmp_path, tmp_path, ("", ()), lambda name: False)) == ()


def test_an_npu_without_torch_npu(system):
    (line,) = advice(TORCH, system(("", ())))
    assert "davinci0" in line
    assert 'pip install "torch-npu==2.13.*"' in line


@pytest.mark.parametrize(
    ("package", "made_for"),
    [
        (("2.12.0.post3", ("torch==2.12.0",)), "2.12"),
        (("2.7.1", ("torch==2.7.1+cpu", "numpy")), "2.7"),
        (("2.12.0", ()), "2.12"),
        (("2.12.0", ("torchvision==2.13",)), "2.12"),
    ],
)
def test_torch_npu_of_another_torch(system, package, made_for):
    (line,) = advice(TORCH, system(package))
    assert f"torch_npu {package[0]} is made for torch {made_for}, and this is torch {TORCH}" in line
    assert 'pip install "torch-npu==2.13.*"' in line


def test_requirements_count_and_not_the_version(system):
    assert advice(TORCH, system(("9.9.9", ("torch ==2.13.0.*",)))) == ()


@pytest.mark.parametrize("name", ["cann", "ascend-toolkit"])
def test_cann_that_is_installed_and_not_sourced(system, name):
    found = system(opens=False)
    (found.ascend / name).mkdir()
    (found.ascend / name / "set_env.sh").touch()
    (line,) = advice(TORCH, found)
    assert f"source {found.ascend / name / 'set_env.sh'}" in line


def test_no_cann(system):
    (line,) = advice(TORCH, system(opens=False))
    assert "Ascend-cann-toolkit_<version>_linux-$(uname -m).run --full" in line


def test_a_container_without_the_driver(system):
    found = system()
    (found.ascend / "driver").rmdir()
    (line,) = advice(TORCH, found)
    assert f"-v {found.ascend / 'driver'}:{found.ascend / 'driver'}" in line


def test_an_npu_of_the_bus_without_a_driver(system):
    found = system()
    (found.dev / "davinci0").unlink()
    bus(found.pci)
    (line,) = advice(TORCH, found)
    assert "0000:c1:00.0" in line
    assert "npu-driver_<version>_linux-$(uname -m).run --full" in line


@pytest.mark.parametrize("other", [{"vendor": "0x10de"}, {"kind": "0x020000"}])
def test_another_device_of_the_bus(system, other):
    found = system(("", ()))
    (found.dev / "davinci0").unlink()
    bus(found.pci, **other)
    assert advice(TORCH, found) == ()


def test_what_is_installed_is_read_without_importing_it(monkeypatch):
    class Fake:
        version, requires = "2.13.0", None

    monkeypatch.setattr(metadata, "distribution", lambda name: Fake)
    assert room.distribution() == ("2.13.0", ())

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    assert room.distribution() == ("", ())
    assert not room.opens("libthat-nobody-has.so")
    assert room.opens("libc.so.6")


def test_doctor_says_it(system, monkeypatch):
    monkeypatch.setattr(NpuBackend, "advice", lambda self: advice(TORCH, system(("", ()))))
    assert any("torch-npu==2.13.*" in line for line in doctor_page(examine()).data["advice"]["npu"])
