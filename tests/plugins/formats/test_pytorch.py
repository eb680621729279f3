"""Files of ``torch.save`` are read as those of safetensors are, and nothing in them runs."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch
from core_models import same_bits
from format_checks import held, tiny
from safetensors.torch import save_file

import quantport
from quantport.errors import CheckpointError
from quantport_formats import pytorch
from quantport_formats.pytorch import PyTorch

CHECKED_BY = "PyTorch"


def saved(folder, tensors, name="pytorch_model.bin"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny()[0]), encoding="utf-8")
    torch.save(tensors, folder / name)
    return folder


def refused(folder, *found, path=None):
    for call in (quantport.plan, quantport.load):
        with pytest.raises(CheckpointError) as caught:
            call(path or folder, "int8", device="cpu")
    for words in found:
        assert words in caught.value.found
    return caught.value


def test_it_loads_to_the_bits_of_safetensors(tmp_path):
    config, tensors = tiny()
    saved(tmp_path / "a", tensors)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, tmp_path / "b/model.safetensors")
    one, two = (quantport.load(tmp_path / name, "int8", device="cpu") for name in "ab")
    state = two.state_dict()
    assert all(same_bits(tensor, state[name]) for name, tensor in one.state_dict().items())
    assert len(held(one)) == 7


def test_shards_with_an_index_and_a_file_that_is_named(tmp_path):
    _, tensors = tiny()
    names = list(tensors)
    saved(tmp_path, {n: tensors[n] for n in names[:4]}, "pytorch_model-00001-of-00002.bin")
    saved(tmp_path, {n: tensors[n] for n in names[4:]}, "pytorch_model-00002-of-00002.bin")
    refused(tmp_path, "no .safetensors file")
    places = {n: f"pytorch_model-0000{1 + (i >= 4)}-of-00002.bin" for i, n in enumerate(names)}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    for path in (tmp_path, index):
        model = quantport.load(path, "int8", device="cpu")
        assert same_bits(model.model.norm.weight, tensors["model.norm.weight"])
    whole = saved(tmp_path / "whole", tensors, "weights.pt") / "weights.pt"
    again = quantport.load(whole, "int8", device="cpu")
    assert all(same_bits(t, again.state_dict()[n]) for n, t in model.state_dict().items())


def test_views_and_parameters_are_read_where_they_lie(tmp_path):
    """Two tensors of one storage, one of them from its middle on; and the rows of a stack."""
    stack = torch.randn(3, 4, 5)
    source = torch.nn.Parameter(torch.randn(6, 4))
    folder = saved(tmp_path, {"all": stack, "some": stack[1:], "p": source, "none": torch.empty(0, 3)})
    file = PyTorch().open(folder)
    assert same_bits(file.read("all"), stack)
    assert same_bits(file.read("some", (0, slice(1, 3))), stack[1, 1:3])
    assert same_bits(file.read("p", slice(2, 4)), source.detach()[2:4])
    assert file.read("none").shape == (0, 3)
    file.close()


class _Runs:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


def records(path):
    with zipfile.ZipFile(path) as file:
        return {info.filename: file.read(info) for info in file.infolist()}


def zipped(path, content, kind=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, data in content.items():
            file.writestr(name, data)


def compressed(path):
    zipped(path, records(path), zipfile.ZIP_DEFLATED)


def moved(path):
    """Storages are not where PyTorch computes that they are."""
    zipped(path, records(path))


def shorter(path):
    """One storage ends before its tensor does; where storages are is looked up, not computed."""
    plain = {name: data for name, data in records(path).items() if "/." not in name}
    zipped(path, {n: data[:-8] if n.endswith("/data/0") else data for n, data in plain.items()})


def big_endian(path):
    zipped(path, {n: b"big" if n.endswith("byteorder") else data for n, data in records(path).items()})


def legacy(path):
    torch.save(tiny()[1], path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (compressed, "a compressed record"),
        (shorter, "ends after the record"),
        (moved, "not where the file says"),
        (big_endian, "big-endian"),
        (legacy, "before PyTorch 1.6"),
        (lambda path: path.write_bytes(path.read_bytes()[:-900]), "zip"),
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "zip"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.write_bytes(b"version https://git-lfs"), "Git LFS pointer"),
    ],
    ids=["compressed", "shorter", "moved", "big-endian", "legacy", "cut", "head", "empty", "pointer"],
)
def test_a_damaged_file_is_refused(damage, found, tmp_path):
    folder = saved(tmp_path, tiny()[1])
    damage(folder / "pytorch_model.bin")
    refused(folder, found)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"a": _Runs()}, "exec"),
        ({"state_dict": {"a": torch.ones(2)}}, "'state_dict', a dict"),
        ({"a": torch.ones(2, 3).t()}, "not stored one after another"),
        ({"a": torch.eye(3).to_sparse()}, "not stored one after another"),
        ({3: torch.ones(2)}, "'3', a Tensor"),
        ({}, "no tensor"),
        ([torch.ones(2)], "a list"),
    ],
    ids=["code", "nested", "transposed", "sparse", "number", "empty", "list"],
)
def test_what_is_no_state_dict_is_refused(content, found, tmp_path):
    error = refused(saved(tmp_path, content), found)
    assert "safetensors" in error.suggestion or "flat dict" in error.suggestion


def test_a_long_pickle_is_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.setattr(pytorch, "_MAX_PICKLE_BYTES", 100)
    refused(saved(tmp_path, tiny()[1]), "bytes of pickle")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_of_the_hub_it_is_taken_where_there_is_no_safetensors(name, tmp_path, monkeypatch):
    asked = []

    def download(model, **patterns):
        asked.append(patterns.get("allow_patterns"))
        if name.endswith(".bin") <= (asked[-1] is not None):
            saved(tmp_path, tiny()[1]) if name.endswith(".bin") else save_file(tiny()[1], tmp_path / name)
            (tmp_path / "config.json").write_text(json.dumps(tiny()[0]), encoding="utf-8")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert quantport.plan("org/model", "int8", device="cpu").quantized
    assert len(asked) == 1 + name.endswith(".bin")
