"""save: what comes back is bit-identical, and nothing is left behind when it fails."""

from __future__ import annotations

import errno
import json
import weakref

import pytest
import torch
from core_models import DENSE, MOE, SCHEMES, Tiny, ids, made, same_state, write
from core_references import check_parts
from torch import nn

import quantport
from quantport.checkpoint import Checkpoint
from quantport.checkpoint.shard import ShardWriter
from quantport.errors import CheckpointError, ConfigError, QuantportError, SaveError
from quantport.modules import QuantModule


@pytest.mark.parametrize(
    ("path", "scheme"),
    [(DENSE, "int8"), (DENSE, "int4_weight_only"), (MOE, "fp8_per_block"), (MOE, "int4_weight_only_g32")],
    ids=lambda p: getattr(p, "name", p),
)
def test_a_transformers_model_comes_back(path, scheme, tmp_path):
    model = quantport.load(path, scheme)
    folder = quantport.save(model, tmp_path / "out", max_shard_bytes=2_000_000)
    again = quantport.load(folder)
    same_state(again, model)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (folder / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()
    assert (folder / "model.safetensors.index.json").exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quantized_by": "quantport"}
    assert config["architectures"] == json.loads((path / "config.json").read_text())["architectures"]
    assert again.quantport_plan.after == model.quantport_plan.after
    assert {s.layer.name: s.requested_scheme for s in again.quantport_plan.quantized} == {
        s.layer.name: s.requested_scheme for s in model.quantport_plan.quantized
    }


def test_nobody_chose_the_scheme_of_a_saved_checkpoint(tmp_path):
    model = made()
    quantport.quantize_(model, "int4")
    assert quantport.load(quantport.save(model, tmp_path / "out"), model=Tiny).quantport_plan.why == ""


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_any_module_comes_back(scheme, dtype, tmp_path):
    model = made(Tiny, dtype)
    quantport.quantize_(model, scheme)
    again = quantport.load(quantport.save(model, tmp_path / "out"), model=Tiny)
    same_state(again, model)
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize("scheme", ["fp8_per_channel", "mxfp8", "nvfp4"])
def test_a_mapped_checkpoint_is_kept_as_it_lies_in_its_file(scheme, tmp_path):
    """Where the kernel keeps the layout: all processes that map it share its pages."""
    model = made()
    quantport.quantize_(model, scheme, fallback="reference")
    folder = quantport.save(model, tmp_path / "out")
    with Checkpoint.open(folder, mapped=True) as checkpoint:
        again = quantport.load(checkpoint, model=Tiny)
        assert again.up.kernel.keeps_layout
        in_file = {checkpoint.read(name).data_ptr() for name in checkpoint.tensors}
        assert in_file >= {tensor.data_ptr() for tensor in again.up.packed()}
    same_state(again, model)


def test_a_save_holds_the_tensor_that_comes(tmp_path, monkeypatch):
    """And at most the one before it."""
    alive, most, rows = weakref.WeakSet(), [], QuantModule.stored_rows

    def counted(self, elements):
        for name, tensor in rows(self, elements):
            unpacked = tensor.clone()
            alive.add(unpacked.untyped_storage())
            most.append(len(alive))
            yield name, unpacked
            del unpacked

    monkeypatch.setattr(QuantModule, "stored_rows", counted)
    model = made()
    quantport.quantize_(model, "int8")
    quantport.save(model, tmp_path / "out")
    assert len(most) > 10
    assert max(most) <= 2


def test_mixed_schemes_and_a_second_round(tmp_path):
    config = {
        "scheme": "int8",
        "targets": {"*.q_proj": "int4", "lm_head": "fp8"},
        "moe": "int4_g32",
        "ignore": ["*.o_proj"],
    }
    model = quantport.load(MOE, config=config)
    once = quantport.load(quantport.save(model, tmp_path / "one"))
    twice = quantport.load(quantport.save(once, tmp_path / "two"))
    same_state(twice, model)
    for name in ("model.safetensors", "quantport.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_stored_names_and_dtypes_are_the_scheme_layouts(tmp_path):
    model = made()
    quantport.quantize_(model, config={"scheme": "int8", "targets": {"down": "int4"}})
    with Checkpoint.open(quantport.save(model, tmp_path / "out")) as checkpoint:
        found = {name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()}
    assert found["up.weight_codes"] == ((129, 32), torch.int8)
    assert found["up.weight_scale"] == ((129, 1), torch.float32)
    assert found["down.weight_packed"] == ((32, 17), torch.int32)
    assert found["offset"] == ((32,), torch.bfloat16)
    assert {name.removesuffix("_codes") for name in found} == set(model.state_dict())


@pytest.fixture(scope="module")
def model():
    out = made()
    quantport.quantize_(out, "int8")
    return out


@pytest.fixture
def folder(model, tmp_path):
    return quantport.save(model, tmp_path / "saved")


def test_a_taken_directory_is_not_touched(model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("my thesis")
    for overwrite in (False, True):
        with pytest.raises(SaveError) as caught:
            quantport.save(model, tmp_path / "mine", overwrite=overwrite)
        check_parts(caught.value, "mine")
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_overwrite_replaces_a_checkpoint(model, folder, tmp_path):
    with pytest.raises(SaveError, match="overwrite"):
        quantport.save(model, folder)
    (folder / "stale.txt").write_text("old")
    quantport.save(model, folder, overwrite=True)
    assert not (folder / "stale.txt").exists()
    same_state(quantport.load(folder, model=Tiny), model)


def test_saving_over_its_own_source(tmp_path):
    first = quantport.save(quantport.load(DENSE, "int8"), tmp_path / "out")
    model = quantport.load(first)
    quantport.save(model, first, overwrite=True)
    same_state(quantport.load(first), model)
    assert (first / "tokenizer.json").exists()


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_disk_leaves_nothing(model, tmp_path, monkeypatch, failing):
    calls, real = [], ShardWriter.finish

    def full(self):
        calls.append(self)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self)

    monkeypatch.setattr(ShardWriter, "finish", full)
    with pytest.raises(SaveError) as caught:
        quantport.save(model, tmp_path / "out", max_shard_bytes=4000)
    check_parts(caught.value, "disk is full")
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_cannot_give_its_weights_leaves_nothing(tmp_path, monkeypatch):
    broken = made()
    quantport.quantize_(broken, "int8")
    monkeypatch.setattr(type(broken.down), "stored_rows", lambda self, elements: 1 // 0)
    with pytest.raises(SaveError, match="ZeroDivisionError"):
        quantport.save(broken, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_save(tmp_path):
    with pytest.raises(SaveError, match="no quantized layer"):
        quantport.save(made(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_files_of_the_working_directory_stay_out(model, tmp_path, monkeypatch):
    """A module of no checkpoint has no config.json; the one that happens to lie here is not its own."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "config.json").write_text('{"architectures": ["SomebodyElse"]}')
    (work / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(work)
    out = quantport.save(model, tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == ["model.safetensors", "quantport.json"]


def test_tied_parameters_are_written_once(tmp_path):
    folder = quantport.save(quantport.load(DENSE, "int8"), tmp_path / "out")
    with Checkpoint.open(folder) as checkpoint:
        assert (
            sum(name in checkpoint.tensors for name in ("lm_head.weight", "model.embed_tokens.weight")) == 1
        )


def test_a_saved_checkpoint_is_not_quantized_again(folder):
    for options in ({"scheme": "int8"}, {"config": {"scheme": "fp8"}}):
        with pytest.raises(ConfigError) as caught:
            quantport.load(folder, model=Tiny, **options)
        check_parts(caught.value, "quantized already", "without scheme=")


def test_the_wrong_factory_is_refused(folder):
    for factory in (lambda: nn.ModuleDict({"other": nn.Linear(2, 2)}), lambda: Tiny(hidden=16)):
        with pytest.raises(QuantportError) as caught:
            quantport.load(folder, model=factory)
        check_parts(caught.value)


def _edit(folder, **changes):
    record = json.loads((folder / "quantport.json").read_text())
    record["layers"]["up"].update(changes)
    (folder / "quantport.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": "int9"},
        {"scheme": "fp8_per_tensor"},
        {"weights": []},
        {"weights": [["weight", 129, 31]]},
        {"weights": [["weight", -1, 32]]},
        {"weights": "abc"},
        {"dtype": "load"},
        {"experts": 3},
        {"experts": -1},
        {"kind": "conv"},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_record_that_lies(folder, change):
    _edit(folder, **change)
    with pytest.raises(QuantportError) as caught:
        quantport.load(folder, model=Tiny)
    check_parts(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 3, "layers": {}}', '{"layers": 3}', '{"layers": {"a": {}}}']
)
def test_a_record_that_is_broken(folder, text):
    (folder / "quantport.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        quantport.load(folder, model=Tiny)
    check_parts(caught.value, "quantport.json")


def test_a_recorded_layer_that_the_model_lacks(folder):
    record = json.loads((folder / "quantport.json").read_text())
    record["layers"]["ghost"] = record["layers"]["up"]
    (folder / "quantport.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"ghost\.weight"):
        quantport.load(folder, model=Tiny)


def test_a_missing_scale_is_named(folder):
    with Checkpoint.open(folder) as checkpoint:
        kept = {
            name: checkpoint.read(name).clone() for name in checkpoint.tensors if name != "up.weight_scale"
        }
    write(folder, kept)
    with pytest.raises(CheckpointError, match=r"up\.weight_scale"):
        quantport.load(folder, model=Tiny)


@pytest.mark.parametrize("fallback", ["weight_only", "reference"])
def test_what_runs_is_the_same_after_a_round_trip(fallback, tmp_path):
    """fp8 activations, which no host processor multiplies: W8A16, or W8A8 emulated."""
    model = made()
    quantport.quantize_(model, "fp8_per_channel", fallback=fallback)
    folder = quantport.save(model, tmp_path / "out")
    tokens = torch.arange(12).view(2, 6)
    again = quantport.load(folder, model=Tiny)
    assert again.quantport_plan.config.fallback == fallback
    assert {s.layer.name: s.choice.precision for s in again.quantport_plan.quantized} == {
        s.layer.name: s.choice.precision for s in model.quantport_plan.quantized
    }
    assert torch.equal(again(tokens), model(tokens))
    assert again.quantport_plan.quantized[0].choice.precision == (
        "W8A8" if fallback == "reference" else "W8A16"
    )
    other = {"weight_only": "reference", "reference": "weight_only"}[fallback]
    for options in ({"fallback": other}, {"config": {"fallback": other}}):
        assert quantport.load(folder, model=Tiny, **options).quantport_plan.config.fallback == other


def test_a_checkpoint_that_says_nothing_of_a_fallback_has_the_default(tmp_path):
    model = made()
    quantport.quantize_(model, "fp8_per_channel", fallback="reference")
    folder = quantport.save(model, tmp_path / "out")
    record = json.loads((folder / "quantport.json").read_text())
    del record["fallback"]
    (folder / "quantport.json").write_text(json.dumps(record))
    assert quantport.load(folder, model=Tiny).quantport_plan.config.fallback == "weight_only"
    (folder / "quantport.json").write_text(json.dumps({**record, "fallback": "never"}))
    with pytest.raises(QuantportError, match="fallback"):
        quantport.load(folder, model=Tiny)
