"""Small weights that are alike are quantized as one: with the bytes of each alone, in memory of its own."""

from __future__ import annotations

import pytest
import torch
from core_models import same_state, write
from core_references import check_parts

import quantport
from quantport import numerics
from quantport.errors import WeightError
from quantport.loading import quantize_checkpoint, weight_tasks
from quantport.numerics.by_rows import stacks
from quantport.scheme.catalog import BUILTIN

SHAPES = {"a": (128, 64), "b": (24, 256), "c": (128, 64)}
COUNT = 96
SCHEMES = [name for name, scheme in BUILTIN.items() if name != "bf16" and not scheme.ordered]


def factory():
    layers = {
        f"{x}{i}": torch.nn.Linear(*SHAPES[x][::-1], bias=False, dtype=torch.bfloat16)
        for i in range(COUNT // 3)
        for x in SHAPES
    }
    return torch.nn.ModuleDict(layers)


@pytest.fixture(scope="module")
def weights():
    made = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(p.shape, generator=made).bfloat16() * 2.0 ** (i % 5)
        for i, (name, p) in enumerate(factory().named_parameters())
    }


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    return write(tmp_path_factory.mktemp("small") / "m", weights)


def quantized(monkeypatch):
    """Rows of every weight, or of several, that are quantized from now on."""
    rows, real = [], numerics.quantize_weight
    monkeypatch.setattr(
        weight_tasks.numerics, "quantize_weight", lambda x, *args: rows.append(len(x)) or real(x, *args)
    )
    return rows


def alone(monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(weight_tasks, "_stacks", lambda spec, dtype: False)
        return call()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_are_those_of_each_by_itself(scheme, folder, monkeypatch):
    def load():
        return quantport.load(folder, scheme, model=factory, workers=1)

    expected, rows = alone(monkeypatch, load), quantized(monkeypatch)
    model = load()
    same_state(model, expected)
    together = [x for x in SHAPES if stacks(BUILTIN[scheme], SHAPES[x][0])]
    assert (len(rows) < COUNT) == bool(together)
    assert sum(rows) == sum(n for n, _ in SHAPES.values()) * COUNT // 3
    for name, buffer in model.named_buffers():
        assert buffer.untyped_storage().nbytes() == buffer.nbytes, name


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8_per_block"])
def test_so_are_those_of_a_model_in_memory_and_of_a_directory(scheme, folder, weights, tmp_path, monkeypatch):
    def quantize():
        model = factory()
        model.load_state_dict(weights)
        quantport.quantize_(model, scheme)
        return model

    expected, rows = alone(monkeypatch, quantize), quantized(monkeypatch)
    same_state(quantize(), expected)
    assert len(rows) < COUNT
    quantport.save(expected, tmp_path / "saved")
    quantize_checkpoint(folder, tmp_path / "streamed", scheme, model=factory)
    for file in (tmp_path / "saved").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "streamed" / file.name).read_bytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["int8", "int4_mse", "fp8_per_tensor"])
def test_what_is_not_finite_is_named_or_zeroed_where_it_is(scheme, bad, weights, tmp_path, monkeypatch):
    changed = {name: weight.clone() for name, weight in weights.items()}
    changed["c5.weight"][7, 9] = bad
    folder = write(tmp_path / "m", changed)
    with pytest.raises(WeightError) as caught:
        quantport.load(folder, scheme, model=factory)
    check_parts(caught.value, "c5")

    def load():
        return quantport.load(folder, config={"scheme": scheme, "nonfinite": "zero"}, model=factory)

    same_state(load(), alone(monkeypatch, load))
    changed["c5.weight"][7, 9] = 0
    same_state(load(), quantport.load(write(tmp_path / "z", changed), scheme, model=factory))
