"""What every room has, and what is in the wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import house_source as house
import pytest

ROOMS = house.rooms()


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_is_complete(name):
    package = ROOMS[name] / f"quantport_{name}"
    expected = [ROOMS[name] / "README.md", package / "py.typed", package / "__init__.py"]
    if name not in house.NO_DEVICE:
        expected += [package / "detect.py", package / "capabilities.py", package / "kernels" / "__init__.py"]
        expected.append(house.ROOT / "tests" / "backends" / name / "test_conformance.py")
        assert house.entry_points("quantport.backends").get(name) == f"quantport_{name}"
    assert not [str(p.relative_to(house.ROOT)) for p in expected if not p.exists()]


@pytest.mark.parametrize("folder", sorted((house.ROOT / "plugins").iterdir()), ids=lambda folder: folder.name)
def test_a_room_of_plugins_is_complete(folder):
    package = folder / f"quantport_{folder.name}"
    expected = [folder / "README.md", package / "py.typed", package / "__init__.py"]
    assert not [str(p.relative_to(house.ROOT)) for p in expected if not p.exists()]
    found = house.entry_points("quantport.plugins").get(folder.name)
    assert found == (None if folder.name in house.INTEGRATIONS else f"quantport_{folder.name}")


def test_a_format_is_one_file_with_one_test():
    package = house.ROOT / "plugins" / "formats" / "quantport_formats"
    tests = house.ROOT / "tests" / "plugins" / "formats"
    for path in package.glob("*.py"):
        if any("(CheckpointFormat)" in line for line in path.read_text(encoding="utf-8").splitlines()):
            assert (tests / f"test_{path.stem}.py").exists(), path.name


@pytest.mark.parametrize("name", sorted(set(ROOMS) - house.NO_DEVICE))
def test_a_room_runs_the_conformance_suite_of_its_own_kind(name):
    text = (house.ROOT / "tests" / "backends" / name / "test_conformance.py").read_text(encoding="utf-8")
    assert "(BackendConformance)" in text
    assert f'kind = "{name}"' in text


def test_every_entry_point_is_a_room():
    assert set(house.entry_points("quantport.backends")) == set(ROOMS) - house.NO_DEVICE


def test_the_wheel_holds_the_house_and_nothing_else(tmp_path):
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=house.ROOT, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name.split("/")[0]}
    assert tops == {"quantport", *house.packages()}
    assert {f"{top}/py.typed" for top in tops} <= set(names)
    assert not [name for name in names if "test_" in name or name.endswith((".pyc", ".safetensors"))]
