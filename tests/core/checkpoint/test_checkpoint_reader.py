"""Reading tensors, into memory or as views of mapped files whose pages are given back."""

from __future__ import annotations

import os
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_blobs import blob, entry, equal, raises, weights, write_index
from safetensors.torch import load_file, save_file

from quantport.checkpoint import Checkpoint
from quantport.checkpoint.mapping import MappedFile
from quantport.checkpoint.streaming import StreamedFile
from quantport.errors import CheckpointError

both = pytest.mark.parametrize("mapped", [False, True], ids=["streamed", "mapped"])

# --- headers only
# ------------------------------------------------------------------------------------------------------


def test_46000_tensors_in_163_header_only_shards(tmp_path: Path) -> None:
    """A plan for 671B parameters needs no weights. Only counts are asserted: times depend on the machine."""
    shards, total, count = 163, 46_000, 0
    size = 2048 * 7168
    weight_map = {}
    for shard in range(shards):
        names = [f"model.layers.{i // 800}.mlp.experts.{i % 800}.weight" for i in range(shard, total, shards)]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header = {
            name: entry("F8_E4M3", [2048, 7168], i * size, (i + 1) * size) for i, name in enumerate(names)
        }
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


# --- reading
# -----------------------------------------------------------------------------------------------------------


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
    checkpoint = Checkpoint.open(tmp_path, mapped=True)
    whole, rows = checkpoint.read("b"), checkpoint.read("b", slice(3, 7))
    assert mapping_of(whole.data_ptr()) == f"rw-p {tmp_path / 'model.safetensors'}"
    assert rows.data_ptr() == whole.data_ptr() + 3 * 64 * 2
    assert checkpoint.read("b").data_ptr() == whole.data_ptr()
    assert (
        whole.data_ptr() - checkpoint.read("a").data_ptr()
        == checkpoint.tensors["b"].start - checkpoint.tensors["a"].start
    )


@both
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, mapped: bool) -> None:
    made = {}
    for name in (
        "bfloat16",
        "float16",
        "float32",
        "float64",
        "float8_e4m3fn",
        "float8_e5m2",
        "int8",
        "uint8",
        "int32",
        "int64",
    ):
        made[name] = (
            torch.arange(24, dtype=torch.uint8)
            .view(torch.uint8)
            .repeat(8)
            .view(getattr(torch, name))
            .view(2, -1)
        )
    made |= {
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3, dtype=torch.int8),
    }
    save_file(made, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path, mapped=mapped)
    theirs = load_file(tmp_path / "model.safetensors")
    for name, expected in made.items():
        found = checkpoint.read(name)
        assert equal(found, expected)
        assert equal(found, theirs[name])
        assert found.is_contiguous()
        checkpoint.release(name)


@both
def test_rows(tmp_path: Path, mapped: bool) -> None:
    expected = weights("a", rows=10)["a"]
    save_file(
        {"a": expected, "none": torch.empty(0, 4), "flat": torch.empty(4, 0)}, tmp_path / "model.safetensors"
    )
    checkpoint = Checkpoint.open(tmp_path, mapped=mapped)
    for rows in (
        slice(None),
        slice(2, 5),
        slice(-3, None),
        slice(8, 99),
        slice(5, 5),
        slice(7, 2),
        slice(0, 4, 1),
    ):
        assert equal(
            checkpoint.read("a", rows),
            expected[rows if (rows.start or 0) <= (rows.stop or 99) else slice(0, 0)],
        )
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


@both
def test_misaligned_data_is_copied_and_right(tmp_path: Path, mapped: bool) -> None:
    values = torch.arange(6, dtype=torch.float32).view(3, 2)
    header = blob({"x": entry("U8", [1], 0, 1), "y": entry("F32", [3, 2], 1, 25)})
    pad = b" " * (-len(header) % 8)
    raw = (
        (len(header) - 8 + len(pad)).to_bytes(8, "little")
        + header[8:]
        + pad
        + b"\7"
        + values.numpy().tobytes()
    )
    (tmp_path / "model.safetensors").write_bytes(raw)
    checkpoint = Checkpoint.open(tmp_path, mapped=mapped)
    found = checkpoint.read("y")
    assert found.data_ptr() % 4 == 0
    assert equal(found, values)
    assert equal(checkpoint.read("y", slice(1, 3)), values[1:])


@both
def test_release_keeps_every_byte(tmp_path: Path, mapped: bool) -> None:
    """Neighbours share pages; views that are alive, rows, and later reads all see the same bytes."""
    expected = weights("a", "b", "c", rows=333, columns=77)
    save_file(expected, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path, mapped=mapped)
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
    checkpoint = Checkpoint.open(tmp_path, mapped=True)

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


@both
def test_writes_to_a_tensor_never_reach_the_file(tmp_path: Path, mapped: bool) -> None:
    expected = weights("a")["a"]
    save_file({"a": expected}, tmp_path / "model.safetensors")
    Checkpoint.open(tmp_path, mapped=mapped).read("a").zero_()
    assert equal(Checkpoint.open(tmp_path).read("a"), expected)


@both
def test_close_with_tensors_alive(tmp_path: Path, mapped: bool) -> None:
    expected = weights("a", "b")
    save_file(expected, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path, mapped=mapped) as checkpoint:
        alive = checkpoint.read("a")
    assert equal(alive, expected["a"])
    checkpoint.release("a")
    checkpoint.close()
    assert equal(alive, expected["a"])
    with raises(CheckpointError, "'b'", found="the checkpoint is closed"):
        checkpoint.read("b")


@both
def test_file_that_changed_or_went_since_open(tmp_path: Path, mapped: bool) -> None:
    file = tmp_path / "model.safetensors"
    save_file(weights("a"), file)
    checkpoint = Checkpoint.open(tmp_path, mapped=mapped)
    save_file(weights("a", "b"), file)
    with raises(CheckpointError, str(file), found="changed since its header was read"):
        checkpoint.read("a")
    file.unlink()
    with raises(CheckpointError, str(file), found="No such file"):
        checkpoint.read("a")


@both
def test_threads_share_one_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool) -> None:
    expected = weights(*(f"w{i}" for i in range(16)))
    save_file(expected, tmp_path / "model.safetensors")
    made: list[str] = []
    failed: list[str] = []
    kind = MappedFile if mapped else StreamedFile
    original = kind.__init__

    def counted(self: object, path: str, *rest: object, **named: object) -> None:
        made.append(path)
        original(self, path, *rest, **named)

    monkeypatch.setattr(kind, "__init__", counted)
    checkpoint = Checkpoint.open(tmp_path, mapped=mapped)

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
    assert int(Checkpoint.open(tmp_path, mapped=True).read("huge", slice(1 << 19, (1 << 19) + 1)).sum()) == 0
