"""The extras of the wheel: one for every room that has a device of its own, with pins that say what the room needs."""

from __future__ import annotations

import house_source as house
import pytest
from packaging.requirements import Requirement

toml = pytest.importorskip("tomllib")
EXTRAS = toml.loads((house.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
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
