"""Seams of checkpoints: tensors that a stranger holds, and a format that a stranger brings."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from core_models import made, same_bits, same_state, write
from torch import nn

import quantport
from quantport import numerics
from quantport.checkpoint import (
    Checkpoint,
    CheckpointFormat,
    QuantizedWeight,
    QuantportFormat,
    Recognized,
    SavedModel,
    SaveTarget,
    TensorSource,
)
from quantport.errors import CheckpointError, ConfigError, SaveError
from quantport.model.layers import Layer, Part, find_layers
from quantport.plugins.registry import Registry
from quantport.scheme.catalog import BUILTIN


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 32)
        self.norm = nn.LayerNorm(32)
        self.b = nn.Linear(32, 16, bias=False)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


class Memory:
    """Tensors of a dict. Nothing of quantport is inherited."""

    def __init__(self, tensors, directory=Path("/nowhere")):
        self.tensors, self.directory = tensors, directory
        self.released, self.closed = set(), False

    def read(self, name, rows=None):
        tensor = self.tensors[name]
        if isinstance(rows, tuple):
            return tensor[rows[0]][rows[1]]
        return tensor if rows is None else tensor[rows]

    def release(self, name, rows=None):
        self.released.add(name)

    def close(self):
        self.closed = True


class Toy(CheckpointFormat):
    """int8 weights as ``*.toy_codes`` (transposed) and ``*.toy_scale``, in files of one JSON header."""

    name = "toy"

    def open(self, path, *, headers_only=False):
        if path.suffix != ".toy":
            return None
        return Memory(torch.load(path, weights_only=True), path.parent)

    def recognize(self, source, config, schemes):
        marked = any(name.endswith(".toy_codes") for name in source.tensors)
        return ToyCheckpoint(self.name, source) if marked else None


class ToyCheckpoint(Recognized):
    def _names(self):
        return [n.removesuffix(".toy_codes") for n in self.source.tensors if n.endswith(".toy_codes")]

    def layers(self):
        out, used = [], set()
        for name in self._names():
            k, n = self.source.tensors[f"{name}.toy_codes"].shape
            tensors = (f"{name}.toy_codes", f"{name}.toy_scale")
            used.update(tensors)
            parts = {"weight": tuple(map(Part, tensors))}
            out.append(Layer(name, "linear", (("weight", n, k),), torch.bfloat16, parts=parts))
        return out + find_layers({n: t for n, t in self.source.tensors.items() if n not in used})

    def quantized(self):
        return {name: {"": self._weight(name)} for name in self._names()}

    def _weight(self, name):
        codes, scale = f"{name}.toy_codes", f"{name}.toy_scale"

        def read(rows):
            return {
                "weight": self.source.read(codes)[:, rows].t().contiguous(),
                "weight_scale": self.source.read(scale, rows),
            }

        return QuantizedWeight(BUILTIN["int8_weight_only"], (codes, scale), read)


def toy_tensors(model):
    tensors = dict(model.state_dict())
    for name in ("a", "b"):
        stored = numerics.quantize_weight(tensors.pop(f"{name}.weight"), BUILTIN["int8_weight_only"])
        tensors[f"{name}.toy_codes"] = stored["weight"].t().contiguous()
        tensors[f"{name}.toy_scale"] = stored["weight_scale"]
    return tensors


@pytest.fixture
def model():
    return made(Net)


def test_tensors_of_a_stranger_load_through_the_same_path(model, tmp_path):
    source = Memory(model.state_dict())
    assert isinstance(source, TensorSource)
    loaded = quantport.load(source, "int8_weight_only", model=Net, device="cpu")
    expected = quantport.load(write(tmp_path / "m", model), "int8_weight_only", model=Net, device="cpu")
    same_state(loaded, expected)
    assert source.released == set(source.tensors)
    assert not source.closed  # who opened it closes it
    assert quantport.plan(source, "int8_weight_only", device="cpu").after == expected.quantport_plan.after


def test_fused_experts_of_a_stranger_are_read_by_rows(tmp_path):
    tensors = {
        "experts.gate_up_proj": torch.randn(2, 16, 32).bfloat16(),
        "experts.down_proj": torch.randn(2, 32, 8).bfloat16(),
    }
    layers = quantport.plan(Memory(tensors), "int8", device="cpu").by_layer
    assert layers["experts"].layer.experts == 2


def knowing(*formats):
    """A registry that knows more formats."""
    registry = Registry()
    registry.formats = dict(enumerate(formats))
    return registry


def test_a_strangers_format_loads_its_own_bits(model, tmp_path):
    tensors = toy_tensors(model)
    torch.save(tensors, tmp_path / "m.toy")
    loaded = quantport.load(tmp_path / "m.toy", model=Net, device="cpu", registry=knowing(Toy()))
    assert loaded.a.scheme == loaded.b.scheme == "int8_weight_only"
    assert same_bits(loaded.a.stored_weight()["weight"], tensors["a.toy_codes"].t())
    expected = quantport.load(write(tmp_path / "m", model), "int8_weight_only", model=Net, device="cpu")
    same_state(loaded, expected)
    again = quantport.load(quantport.save(loaded, tmp_path / "saved"), model=Net, device="cpu")
    same_state(again, expected)


def test_what_a_format_has_quantized_is_not_quantized_again(model, monkeypatch):
    source = Memory(toy_tensors(model))
    monkeypatch.setattr(numerics, "quantize_weight", lambda *a, **k: pytest.fail("quantized again"))
    quantport.load(source, model=Net, device="cpu", registry=knowing(Toy()))
    assert source.released == set(source.tensors)
    for wrong in ({"scheme": "int8"}, {"config": {"scheme": "int8"}}):
        with pytest.raises(ConfigError, match="it is a toy checkpoint: quantized already"):
            quantport.load(source, model=Net, device="cpu", registry=knowing(Toy()), **wrong)
        with pytest.raises(ConfigError, match="it is a toy checkpoint: quantized already"):
            quantport.plan(source, model=Net, device="cpu", registry=knowing(Toy()), **wrong)
    assert all(s.stored for s in quantport.plan(source, device="cpu", registry=knowing(Toy())).quantized)


def test_two_formats_that_recognize_one_checkpoint_are_named(model):
    other = Toy()
    other.name = "theirs"
    with pytest.raises(CheckpointError, match="2 formats recognize it: toy, toy"):
        quantport.load(Memory(toy_tensors(model)), model=Net, device="cpu", registry=knowing(Toy(), Toy()))
    with pytest.raises(CheckpointError, match="toy, theirs"):
        quantport.load(Memory(toy_tensors(model)), model=Net, device="cpu", registry=knowing(Toy(), other))


NONSENSE = {
    "raises": (lambda *_, **__: 1 / 0, "format 'toy' raised ZeroDivisionError"),
    "exits": (lambda *_, **__: sys.exit(2), "format 'toy' raised SystemExit"),
    "answers": (lambda *_, **__: "yes", "it returned 'yes'"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_a_format_that_is_wrong_is_named_and_stops_no_other_load(model, case):
    toy = Toy()
    toy.recognize, named = NONSENSE[case]
    source = Memory(model.state_dict())
    with pytest.warns(RuntimeWarning, match=named):
        loaded = quantport.load(source, "int8", model=Net, device="cpu", registry=knowing(toy))
    assert loaded.a.scheme == "int8"
    codes = Memory({"a.qweight": torch.ones(2, 2, dtype=torch.int32)})
    with pytest.warns(RuntimeWarning, match=named), pytest.raises(CheckpointError, match=named):
        quantport.load(codes, model=Net, device="cpu", registry=knowing(toy))
    fine = Toy()
    fine.name = "fine"
    with pytest.warns(RuntimeWarning, match=named):
        mine = quantport.load(
            Memory(toy_tensors(model)), model=Net, device="cpu", registry=knowing(toy, fine)
        )
    assert mine.a.scheme == "int8_weight_only"


@pytest.mark.parametrize("case", NONSENSE)
def test_a_reader_that_is_wrong_is_named_and_stops_no_other(model, tmp_path, case):
    toy, fine = Toy(), Toy()
    toy.open, named = NONSENSE[case]
    fine.name = "fine"
    torch.save(toy_tensors(model), tmp_path / "m.toy")
    with pytest.warns(RuntimeWarning, match=named):
        mine = quantport.load(tmp_path / "m.toy", model=Net, device="cpu", registry=knowing(toy, fine))
    assert mine.a.scheme == "int8_weight_only"
    with pytest.warns(RuntimeWarning, match=named), pytest.raises(CheckpointError, match=named):
        quantport.load(tmp_path / "m.toy", model=Net, device="cpu", registry=knowing(toy))


def test_strangers_are_not_asked_about_safetensors_and_what_is_ours(model, tmp_path):
    toy = Toy()
    toy.open = lambda *_, **__: pytest.fail("asked to open")
    folder = write(tmp_path / "m", model)
    for path in (folder, folder / "model.safetensors"):
        net = quantport.load(path, "int8", model=Net, device="cpu", registry=knowing(toy))
    saved = quantport.save(net, tmp_path / "q")
    toy.recognize = lambda *_: pytest.fail("asked to recognize")
    same_state(quantport.load(saved, model=Net, device="cpu", registry=knowing(toy)), net)


def test_malformed_is_an_answer_of_a_format(model):
    toy = Toy()

    def malformed(*_):
        raise CheckpointError("read toys", "a toy without scales", "another toy")

    toy.recognize = malformed
    with pytest.raises(CheckpointError, match="a toy without scales"):
        quantport.load(Memory(model.state_dict()), "int8", model=Net, device="cpu", registry=knowing(toy))


def test_what_nobody_recognizes_says_who_made_it(model):
    with pytest.raises(CheckpointError, match="GPTQ or AWQ"):
        quantport.load(Memory({"a.qweight": torch.ones(2, 2, dtype=torch.int32)}), "int8", model=Net)


def test_a_format_that_is_only_read_says_so(tmp_path):
    with pytest.raises(SaveError, match="'toy' is only read"):
        Toy().write(SavedModel({}), [], None, SaveTarget(tmp_path / "x"))


class Kept(Toy):
    """What ``auto`` writes of models that have a configuration."""

    default = True

    def write(self, model, tensors, layout, to):
        return to.save(tensors, layout, {"toy.txt": b"toy"})

    def refusal(self, model):
        return None if model.config else "no configuration"


def test_auto_writes_a_format_of_a_stranger_where_it_holds_the_model(model, tmp_path):
    registry = knowing(Kept())
    net = quantport.load(write(tmp_path / "m", model), "int8", model=Net, device="cpu")
    with pytest.warns(UserWarning, match="written as quantport; not as toy: no configuration"):
        quantport.save(net, tmp_path / "own", format="auto", registry=registry)
    assert (tmp_path / "own" / "quantport.json").exists()
    net.config = type("Config", (), {"to_dict": lambda self: {"model_type": "toy"}})()
    quantport.save(net, tmp_path / "toy", format="auto", registry=registry)
    assert (tmp_path / "toy" / "toy.txt").exists()


def test_ours_is_one_of_the_formats(model, tmp_path):
    net = quantport.load(write(tmp_path / "m", model), "int8", model=Net, device="cpu")
    with Checkpoint.open(quantport.save(net, tmp_path / "q")) as source:
        recognized = QuantportFormat().recognize(source, {}, BUILTIN)
        assert {name: list(w) for name, w in recognized.quantized().items()} == {"a": [""], "b": [""]}
        assert recognized.quantized()["a"][""].tensors == ("a.weight_codes", "a.weight_scale")
        assert [layer.name for layer in recognized.layers() if layer.kind == "linear"] == ["a", "b"]
    with Checkpoint.open(tmp_path / "m") as source:
        assert QuantportFormat().recognize(source, {}, BUILTIN) is None
