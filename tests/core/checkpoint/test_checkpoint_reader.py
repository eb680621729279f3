"""Opening checkpoints of every layout, good and bad, and reading tensors without a copy."""

from __future__ import annotations

import os
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_blobs import blob, entry, raises, sharded, weights, write_index
from quantport.checkpoint import Checkpoint, TensorInfo
from quantport.checkpoint.mapping import MappedFile
from quantport.errors import CheckpointError
from safetensors.torch import load_file, save_file

SHARD = "model-{:05d}-of-00002.safetensors"
ONE, TWO = SHARD.format(1), SHARD.format(2)


def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Same dtype, shape and bits."""
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    return torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


# --- layouts -----------------------------------------------------------------------------------------------------------


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


# --- what is wrong with a directory ------------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    with raises(CheckpointError, str(tmp_path / "absent"), found="nothing at this path"):
        Checkpoint.open(tmp_path / "absent")


def test_empty_directory(tmp_path: Path) -> None:
    with raises(CheckpointError, str(tmp_path), found="no .safetensors file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "works"),
    [
        ("pytorch_model.bin", "save_pretrained"),
        ("consolidated.00.pth", "save_pretrained"),
        ("model-Q4_K_M.gguf", "original BF16/FP16"),
    ],
)
def test_only_other_formats(tmp_path: Path, name: str, works: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "config.json").write_text("{}")
    with raises(CheckpointError, str(tmp_path), works, found=f"no .safetensors file, only {name}"):
        Checkpoint.open(tmp_path)
    with raises(CheckpointError, name, works, found=f"only {name}"):
        Checkpoint.open(tmp_path / name)


def test_a_pipeline_names_its_parts(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    save_file(weights("a"), tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    with raises(CheckpointError, str(tmp_path / "transformer"), found="no .safetensors file"):
        Checkpoint.open(tmp_path)


def test_several_indexes(tmp_path: Path) -> None:
    for stem in ("model.fp16", "model.bf16"):
        write_index(tmp_path, {"a": ONE}, stem)
    with raises(CheckpointError, "pass the path of one", found="model.bf16.safetensors.index.json, model.fp16"):
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
    "not JSON": (b"{", "no readable JSON"),
    "not UTF-8": (b'{"\xff": 1}', "no readable JSON"),
    "nested": (b"[" * 100_000, "no readable JSON"),
    "list": (b"[]", "no weight_map"),
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


# --- headers only ------------------------------------------------------------------------------------------------------


def test_46000_tensors_in_163_header_only_shards(tmp_path: Path) -> None:
    """A plan for 671B parameters needs no weights. Only counts are asserted: times depend on the machine."""
    shards, total, count = 163, 46_000, 0
    size = 2048 * 7168
    weight_map = {}
    for shard in range(shards):
        names = [f"model.layers.{i // 800}.mlp.experts.{i % 800}.weight" for i in range(shard, total, shards)]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header = {name: entry("F8_E4M3", [2048, 7168], i * size, (i + 1) * size) for i, name in enumerate(names)}
        (tmp_path / file).write_bytes(blob(header))
        weight_map |= dict.fromkeys(names, file)
        count += len(names)
    write_index(tmp_path, weight_map)
    checkpoint = Checkpoint.open(tmp_path, headers_only=True)
    assert (len(checkpoint.tensors), len(checkpoint.files)) == (count, shards) == (46_000, 163)
    assert checkpoint.total_bytes == total * size
    name = next(iter(checkpoint.tensors))
    with raises(CheckpointError, name, checkpoint.tensors[name].file, found="holds only its header"):
        checkpoint.read(name)
    checkpoint.release(name)
    with raises(CheckpointError, found="truncated"):
        Checkpoint.open(tmp_path)


# --- reading -----------------------------------------------------------------------------------------------------------


def mapping_of(address: int) -> str | None:
    """The file whose mapping holds an address, by /proc/self/maps."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= address < high:
            return f"{line.split()[1]} {line.split(maxsplit=5)[-1]}"
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/maps")
def test_read_is_a_view_of_a_private_mapping(tmp_path: Path) -> None:
    save_file(weights("a", "b"), tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    whole, rows = checkpoint.read("b"), checkpoint.read("b", slice(3, 7))
    assert mapping_of(whole.data_ptr()) == f"rw-p {tmp_path / 'model.safetensors'}"
    assert rows.data_ptr() == whole.data_ptr() + 3 * 64 * 2
    assert checkpoint.read("b").data_ptr() == whole.data_ptr()
    assert whole.data_ptr() - checkpoint.read("a").data_ptr() == checkpoint.tensors["b"].start - checkpoint.tensors["a"].start


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    made = {}
    for name in ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int32", "int64"):
        made[name] = torch.arange(24, dtype=torch.uint8).view(torch.uint8).repeat(8).view(getattr(torch, name)).view(2, -1)
    made |= {"bool": torch.tensor([True, False]), "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3, dtype=torch.int8)}
    save_file(made, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    for name, expected in made.items():
        found = checkpoint.read(name)
        assert equal(found, expected)
        assert equal(found, theirs[name])
        assert found.is_contiguous()
        checkpoint.release(name)


def test_rows(tmp_path: Path) -> None:
    expected = weights("a", rows=10)["a"]
    save_file({"a": expected, "none": torch.empty(0, 4), "flat": torch.empty(4, 0)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for rows in (slice(None), slice(2, 5), slice(-3, None), slice(8, 99), slice(5, 5), slice(7, 2), slice(0, 4, 1)):
        assert equal(checkpoint.read("a", rows), expected[rows if (rows.start or 0) <= (rows.stop or 99) else slice(0, 0)])
    assert checkpoint.read("none", slice(0, 2)).shape == (0, 4)
    assert checkpoint.read("flat", slice(1, 3)).shape == (2, 0)


def test_bad_rows_and_names(tmp_path: Path) -> None:
    save_file({"model.wq": torch.ones(4, 4), "scalar": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with raises(CheckpointError, "'model.wq'", found="a slice of step 2"):
        checkpoint.read("model.wq", slice(0, 4, 2))
    with raises(CheckpointError, "'scalar'", found="a scalar"):
        checkpoint.read("scalar", slice(0, 1))
    for use in (checkpoint.read, checkpoint.release):
        with raises(CheckpointError, "'model.wk'", "did you mean 'model.wq'", found="no tensor of this name"):
            use("model.wk")


def test_misaligned_data_is_copied_and_right(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float32).view(3, 2)
    header = blob({"x": entry("U8", [1], 0, 1), "y": entry("F32", [3, 2], 1, 25)})
    pad = b" " * (-len(header) % 8)
    raw = (len(header) - 8 + len(pad)).to_bytes(8, "little") + header[8:] + pad + b"\7" + values.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(raw)
    checkpoint = Checkpoint.open(tmp_path)
    found = checkpoint.read("y")
    assert found.data_ptr() % 4 == 0
    assert equal(found, values)
    assert equal(checkpoint.read("y", slice(1, 3)), values[1:])


def test_release_keeps_every_byte(tmp_path: Path) -> None:
    """Neighbours share pages; views that are alive, rows, and later reads all see the same bytes."""
    expected = weights("a", "b", "c", rows=333, columns=77)
    save_file(expected, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    alive = {name: checkpoint.read(name) for name in expected}
    for name in expected:
        assert equal(checkpoint.read(name), expected[name])
        checkpoint.release(name)
        checkpoint.release(name, slice(5, 300))
        assert all(equal(alive[other], expected[other]) for other in expected)
        assert equal(checkpoint.read(name), expected[name])


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_release_gives_the_pages_back(tmp_path: Path) -> None:
    """The resident part of the mapping, by /proc/self/smaps, falls to less than the pages at the two ends."""
    save_file({"a": torch.ones(4 << 20, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)

    def resident() -> int:
        text = Path("/proc/self/smaps").read_text()
        part = text[text.index(str(tmp_path / "model.safetensors")) :]
        match = re.search(r"^Rss:\s+(\d+) kB", part, re.MULTILINE)
        assert match is not None
        return int(match[1]) * 1024

    assert int(checkpoint.read("a").sum(dtype=torch.int64)) == 4 << 20
    before = resident()
    checkpoint.release("a", slice(0, 2 << 20))
    half = resident()
    checkpoint.release("a")
    assert before >= 4 << 20
    assert half <= (2 << 20) + 65536
    assert resident() <= 65536


def test_writes_to_a_view_never_reach_the_file(tmp_path: Path) -> None:
    expected = weights("a")["a"]
    save_file({"a": expected}, tmp_path / "model.safetensors")
    Checkpoint.open(tmp_path).read("a").zero_()
    assert equal(Checkpoint.open(tmp_path).read("a"), expected)


def test_close_with_views_alive(tmp_path: Path) -> None:
    expected = weights("a", "b")
    save_file(expected, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        alive = checkpoint.read("a")
    assert equal(alive, expected["a"])
    checkpoint.release("a")
    checkpoint.close()
    assert equal(alive, expected["a"])
    with raises(CheckpointError, "'b'", found="the checkpoint is closed"):
        checkpoint.read("b")


def test_file_that_changed_or_went_since_open(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(weights("a"), file)
    checkpoint = Checkpoint.open(tmp_path)
    save_file(weights("a", "b"), file)
    with raises(CheckpointError, str(file), found="changed since its header was read"):
        checkpoint.read("a")
    file.unlink()
    with raises(CheckpointError, str(file), found="No such file"):
        checkpoint.read("a")


def test_threads_share_one_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = weights(*(f"w{i}" for i in range(16)))
    save_file(expected, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    made: list[str] = []
    failed: list[str] = []
    original = MappedFile.__init__

    def counted(self: MappedFile, path: str, stamp: tuple[int, int]) -> None:
        made.append(path)
        original(self, path, stamp)

    monkeypatch.setattr(MappedFile, "__init__", counted)

    def work() -> None:
        for name, tensor in expected.items():
            if not equal(checkpoint.read(name), tensor):
                failed.append(name)
            checkpoint.release(name)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(made) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="Linux refuses mappings that it must reserve memory for")
def test_a_file_larger_than_the_memory_can_be_mapped(tmp_path: Path) -> None:
    """A sparse file of 4 TiB: with a reservation, mmap would fail with ENOMEM."""
    size = 1 << 42
    file = tmp_path / "model.safetensors"
    header = blob({"huge": entry("U8", [1 << 20, 1 << 22], 0, size)})
    file.write_bytes(header)
    try:
        os.truncate(file, len(header) + size)
    except OSError as error:
        pytest.skip(f"no sparse files of 4 TiB here: {error}")
    assert int(Checkpoint.open(tmp_path).read("huge", slice(1 << 19, (1 << 19) + 1)).sum()) == 0
