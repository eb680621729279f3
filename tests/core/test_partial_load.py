"""The quantized layers of a model that another library builds and loads otherwise."""

from __future__ import annotations

import pytest
import torch
from core_models import Tiny, made, same_state, write
from core_references import check_parts

import quantport
from quantport.checkpoint import Checkpoint
from quantport.engine import PartialLoad
from quantport.errors import BudgetError, ConfigError
from quantport.loading import partial_load
from quantport.loading.build_context import building


def as_they_are(names):
    return {name: name for name in names}


def part_of(folder, config="int8", **options):
    with building():
        model = Tiny()
    return model, PartialLoad(folder, model, as_they_are, config, torch.bfloat16, "cpu", **options)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", made())


@pytest.mark.parametrize("config", ["int8", "nf4", {"scheme": "int8", "moe": None}], ids=str)
def test_with_the_rest_it_is_what_load_makes(config, folder):
    model, part = part_of(folder, config)
    names = model.state_dict().keys()
    assert not any(f"{path}.weight" in names for path in part.modules)
    rest = {name: tensor for name, tensor in made().state_dict().items() if name in names}
    assert model.load_state_dict(rest, strict=False, assign=True).unexpected_keys == []
    done = []
    plan = part.fill(progress=lambda *step: done.append(step[:2]))
    expected = quantport.load(folder, config=config, model=Tiny, device="cpu")
    same_state(model, expected)
    assert plan is model.quantport_plan
    assert [s.scheme for s in plan.steps] == [s.scheme for s in expected.quantport_plan.steps]
    assert done[-1][0] == done[-1][1]


def test_a_module_announces_what_it_will_hold_to_those_who_count_parameters(folder):
    model, part = part_of(folder, "int8_weight_only")
    bare = sum(p.nbytes for p in model.parameters())
    for path, size in part.sizes.items():
        part.modules[path].announce_size(size)
    assert sum(p.nbytes for p in model.parameters()) == bare + sum(part.sizes.values())
    assert all(p.is_meta for p in model.parameters())
    for module in part.modules.values():
        module.announce_size(0)
    assert sum(p.nbytes for p in model.parameters()) == bare
    part.fill()
    held = {path: sum(t.nbytes for _, t in m.stored_tensors()) for path, m in part.modules.items()}
    assert sum(held.values()) <= sum(part.sizes.values())


def test_each_module_is_filled_on_its_device(folder):
    _, part = part_of(folder)
    asked = []
    part.fill(lambda path: asked.append(path) or torch.device("cpu"))
    assert set(asked) == set(part.modules)


def test_files_are_closed_once_it_is_filled_or_let_go_of(folder, monkeypatch):
    closed, close = [], Checkpoint.close
    monkeypatch.setattr(Checkpoint, "close", lambda self: closed.append(self) or close(self))
    _, part = part_of(folder)
    assert not closed
    part.fill()
    assert len(closed) == 1
    _, part = part_of(folder)
    del part
    assert len(closed) == 2
    with pytest.raises(ConfigError):
        part_of(folder, {"scheme": "int8", "ignore": ["nowhere"]})
    assert len(closed) == 3


def test_what_does_not_fit_is_refused_unless_several_devices_share_it(folder, monkeypatch):
    def too_large(plan, asked):
        raise BudgetError(asked, "1 byte is free", "more memory")

    monkeypatch.setattr(partial_load, "fits", too_large)
    with pytest.raises(BudgetError) as caught:
        part_of(folder)
    check_parts(caught.value, str(folder), "1 byte")
    part_of(folder, spread=True)[1].fill()
