"""Opening checkpoints of every layout, good and bad."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from checkpoint_blobs import equal, raises, sharded, weights, write_index
from safetensors.torch import save_file

from quantport.checkpoint import Checkpoint, TensorInfo
from quantport.errors import CheckpointError

SHARD = "model-{:05d}-of-00002.safetensors"
ONE, TWO = SHARD.format(1), SHARD.format(2)


# --- layouts
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "diffusion_pytorch_model", "consolidated"])
def test_directory_with_one_file(tmp_path: Path, name: str) -> None:
    expected = weights("a", "b")
    save_file(expected, tmp_path / f"{name}.safetensors", metadata={"format": "pt"})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.files == (tmp_path / f"{name}.safetensors",)
        assert checkpoint.directory == tmp_path
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.total_bytes == sum(t.nbytes for t in expected.values())
        assert all(isinstance(info, TensorInfo) for info in checkpoint.tensors.values())
        assert all(equal(checkpoint.read(n), expected[n]) for n in checkpoint.tensors)


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "other"])
def test_directory_with_an_index(tmp_path: Path, stem: str) -> None:
    shards = {ONE: weights("a", "b"), TWO: weights("c")}
    sharded(tmp_path, shards, stem)
    for path in (tmp_path, str(tmp_path), tmp_path / f"{stem}.safetensors.index.json"):
        with Checkpoint.open(path) as checkpoint:
            assert list(checkpoint.tensors) == ["a", "b", "c"]
            assert [file.name for file in checkpoint.files] == [ONE, TWO]
            assert equal(checkpoint.read("c"), shards[TWO]["c"])


def test_one_file_and_shards_without_an_index(tmp_path: Path) -> None:
    save_file(weights("a"), tmp_path / ONE)
    save_file(weights("b"), tmp_path / TWO)
    assert set(Checkpoint.open(tmp_path).tensors) == {"a", "b"}
    assert set(Checkpoint.open(tmp_path / TWO).tensors) == {"b"}


def test_a_single_file_wins_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    sharded(tmp_path, {ONE: weights("a"), TWO: weights("b")})
    save_file(weights("whole"), tmp_path / "model.safetensors")
    assert set(Checkpoint.open(tmp_path).tensors) == {"whole"}


def test_files_that_the_index_does_not_name_are_left_alone(tmp_path: Path) -> None:
    sharded(tmp_path, {ONE: weights("a"), TWO: weights("b")})
    save_file(weights("a", "b"), tmp_path / "consolidated.safetensors")
    assert len(Checkpoint.open(tmp_path).files) == 2


def test_symlinked_files_as_in_the_hub_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(weights("a"), blobs / "0123abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123abc")
    assert set(Checkpoint.open(snapshot).tensors) == {"a"}


def test_merged_metadata_of_the_first_file_wins(tmp_path: Path) -> None:
    save_file(weights("a"), tmp_path / ONE, metadata={"k": "first", "x": "1"})
    save_file(weights("b"), tmp_path / TWO, metadata={"k": "second", "y": "2"})
    assert Checkpoint.open(tmp_path).metadata == {"k": "first", "x": "1", "y": "2"}


# --- what is wrong with a directory
# ------------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    with raises(CheckpointError, str(tmp_path / "absent"), found="nothing at this path"):
        Checkpoint.open(tmp_path / "absent")


def test_empty_directory(tmp_path: Path) -> None:
    with raises(CheckpointError, str(tmp_path), found="no .safetensors file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("pytorch_model.bin", "save_pretrained"),
        ("consolidated.00.pth", "save_pretrained"),
        ("model-Q4_K_M.gguf", "original BF16/FP16"),
    ],
)
def test_only_other_formats(tmp_path: Path, name: str, suggestion: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "config.json").write_text("{}")
    with raises(CheckpointError, str(tmp_path), suggestion, found=f"no .safetensors file, only {name}"):
        Checkpoint.open(tmp_path)
    with raises(CheckpointError, name, suggestion, found=f"only {name}"):
        Checkpoint.open(tmp_path / name)


def test_a_pipeline_names_its_parts(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    save_file(weights("a"), tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    with raises(CheckpointError, str(tmp_path / "transformer"), found="no .safetensors file"):
        Checkpoint.open(tmp_path)


def test_several_indexes(tmp_path: Path) -> None:
    for stem in ("model.fp16", "model.bf16"):
        write_index(tmp_path, {"a": ONE}, stem)
    with raises(
        CheckpointError, "pass the path of one", found="model.bf16.safetensors.index.json, model.fp16"
    ):
        Checkpoint.open(tmp_path)


def test_absent_shards(tmp_path: Path) -> None:
    sharded(tmp_path, {ONE: weights("a"), TWO: weights("b")})
    (tmp_path / TWO).unlink()
    with raises(CheckpointError, "model.safetensors.index.json", TWO, found="1 of 2 files"):
        Checkpoint.open(tmp_path)


def test_absent_shards_without_an_index(tmp_path: Path) -> None:
    save_file(weights("a"), tmp_path / ONE)
    with raises(CheckpointError, str(tmp_path), found="1 of the 2 shards of model"):
        Checkpoint.open(tmp_path)


def test_index_names_a_tensor_that_no_shard_holds(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path, {ONE: weights("a"), TWO: weights("b")})
    write_index(tmp_path, {**weight_map, "ghost": TWO})
    with raises(CheckpointError, "ghost", TWO, found="no shard holds"):
        Checkpoint.open(tmp_path)


def test_shard_holds_a_tensor_that_the_index_does_not_name(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path, {ONE: weights("a", "extra"), TWO: weights("b")})
    del weight_map["extra"]
    write_index(tmp_path, weight_map)
    with raises(CheckpointError, "extra", ONE, found="the index does not name"):
        Checkpoint.open(tmp_path)


def test_index_places_a_tensor_in_another_shard(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path, {ONE: weights("a", "moved"), TWO: weights("b")})
    write_index(tmp_path, {**weight_map, "moved": TWO})
    with raises(CheckpointError, "'moved'", ONE, found=f"where the index says {TWO}"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("indexed", [True, False])
def test_the_same_tensor_in_two_files(tmp_path: Path, indexed: bool) -> None:
    shards = {ONE: weights("a", "twice"), TWO: weights("twice", "b")}
    if indexed:
        sharded(tmp_path, shards)
    else:
        for file, tensors in shards.items():
            save_file(tensors, tmp_path / file)
    with raises(CheckpointError, "'twice'", ONE, TWO, found="both in"):
        Checkpoint.open(tmp_path)


INDEXES = {
    "not JSON": (b"{", "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not UTF-8"),
    "nested": (b"[" * 100_000, "not JSON"),
    "list": (b"[]", "a JSON list"),
    "no weight_map": (b"{}", "no weight_map"),
    "empty weight_map": (b'{"weight_map": {}}', "no weight_map"),
    "weight_map list": (b'{"weight_map": []}', "no weight_map"),
    "file number": (b'{"weight_map": {"a": 1}}', "a int as the file of tensor 'a'"),
    "tensor twice": (b'{"weight_map": {"a": "x", "a": "y"}}', "'a' twice"),
}


@pytest.mark.parametrize(("text", "found"), INDEXES.values(), ids=INDEXES)
def test_bad_index(tmp_path: Path, text: bytes, found: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    with raises(CheckpointError, "model.safetensors.index.json", found=found):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "escape",
    [
        "../x.safetensors",
        "a/../../x.safetensors",
        "/x.safetensors",
        "C:\\x.safetensors",
        "..\\x.safetensors",
        "\\\\h\\s",
        "",
        "x\0y",
    ],
)
def test_index_that_leads_out_of_the_directory(tmp_path: Path, escape: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    save_file(weights("a"), tmp_path / "x.safetensors")
    write_index(inner, {"a": escape})
    with raises(CheckpointError, "model.safetensors.index.json", found=f"{escape!r}, which leads out"):
        Checkpoint.open(inner)


@pytest.mark.parametrize("headers_only", [False, True])
def test_truncated_file_is_named(tmp_path: Path, headers_only: bool) -> None:
    sharded(tmp_path, {ONE: weights("a"), TWO: weights("b")})
    with (tmp_path / TWO).open("r+b") as file:
        file.truncate(os.path.getsize(tmp_path / TWO) - 1)
    with raises(CheckpointError, str(tmp_path / TWO), "'b'", found="truncated"):
        Checkpoint.open(tmp_path, headers_only=headers_only)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    save_file(weights("a"), tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").chmod(0)
    with raises(CheckpointError, str(tmp_path / "model.safetensors"), found="Permission denied"):
        Checkpoint.open(tmp_path)


def test_unreadable_file_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(weights("a"), tmp_path / "model.safetensors")

    def refuse(descriptor: int) -> tuple[int, int]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("quantport.checkpoint.reader.file_stamp", refuse)
    with raises(CheckpointError, str(tmp_path / "model.safetensors"), found="Permission denied"):
        Checkpoint.open(tmp_path)
