"""The extras of the wheel: one for every room that has a device of its own, with pins that say what the room
needs.
"""

from __future__ import annotations

import house_source as house
import pytest
from packaging.requirements import Requirement

toml = pytest.importorskip("tomllib")
EXTRAS = toml.loads((house.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]
DEVICES = set(house.rooms()) - house.NO_DEVICE - {"cpu"}


def requirements(extra):
    return {r.name: r for r in map(Requirement, EXTRAS[extra])}


def test_every_room_with_a_device_has_an_extra():
    assert set(EXTRAS) >= DEVICES


@pytest.mark.parametrize("extra", sorted(DEVICES))
def test_pins_have_a_lower_bound(extra):
    assert requirements(extra)
    for requirement in requirements(extra).values():
        assert {spec.operator for spec in requirement.specifier} >= {">="}


def test_no_extra_installs_another_triton_over_that_of_torch():
    assert {extra for extra in DEVICES if "triton" in requirements(extra)} == {"cuda"}


def test_the_extra_for_intel_asks_for_a_torch_with_all_operators():
    assert not requirements("xpu")["torch"].specifier.contains("2.9.1")
    assert requirements("xpu")["torch"].specifier.contains("2.10.0")


def test_the_oldest_triton_is_that_of_the_extra():
    from quantport_triton import OLDEST

    assert str(requirements("cuda")["triton"].specifier) == ">={}.{}".format(*OLDEST)


@pytest.mark.parametrize(("extra", "index"), [("cuda", "cu130"), ("rocm", "rocm7.2"), ("xpu", "xpu")])
def test_pages_and_advice_name_the_same_index(extra, index):
    """Of builds of torch that PyPI has not, or not for every driver."""
    room = house.ROOT / "backends" / extra
    code = "".join(path.read_text(encoding="utf-8") for path in room.rglob("*.py"))
    assert "https://download.pytorch.org/whl" in code
    assert f"/{index}" in code
    for page in (room / "README.md", house.ROOT / "docs" / "accelerators.md"):
        assert f"--index-url https://download.pytorch.org/whl/{index}`" in page.read_text(encoding="utf-8"), (
            page
        )
