"""What a saved checkpoint holds, and what cannot be saved."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_blobs import only, raises, stream, weights
from safetensors import safe_open
from safetensors.torch import load_file

from quantport.checkpoint import Checkpoint, save_tensors
from quantport.checkpoint.shard import ShardWriter
from quantport.errors import SaveError, WeightError

SIZE = 64 * 64 * 2  # of one tensor of weights()


# --- what is written
# ---------------------------------------------------------------------------------------------------


def test_one_shard_and_extra_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    target = tmp_path / "new" / "model"
    files = {
        "config.json": b'{"a": 1}',
        "sub/notes.txt": b"x",
        "tokenizer.json": tmp_path / "tokenizer.json",
        "sub/again.json": tmp_path / "tokenizer.json",
    }
    made = save_tensors(target, stream("a", "b"), metadata={"k": "v"}, files=files)
    assert made == target
    assert only(target) == ["config.json", "model.safetensors", "sub", "tokenizer.json"]
    assert (target / "config.json").read_bytes() == b'{"a": 1}'
    assert (target / "sub" / "notes.txt").read_bytes() == b"x"
    assert (target / "sub" / "again.json").read_bytes() == b"{}"
    with safe_open(target / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "k": "v"}
    loaded = load_file(target / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights("a", "b").items())
    assert only(tmp_path / "new") == ["model"]


@pytest.mark.skipif(sys.platform == "win32", reason="no modes there")
def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    """Safetensors 0.8 makes files that only their owner can read: on a server, that is not whom they
    are for.
    """
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "m", stream("a", "b"), max_shard_bytes=1, files={"config.json": b""})
    modes = {path.stat().st_mode for path in (tmp_path / "m").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_shards_and_index(tmp_path: Path) -> None:
    names = ["e", "d", "c", "b", "a"]
    save_tensors(tmp_path / "m", stream(*names), max_shard_bytes=2 * SIZE)
    shards = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert only(tmp_path / "m") == [*shards, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * SIZE}
    assert index["weight_map"] == {
        "a": shards[2],
        "b": shards[1],
        "c": shards[1],
        "d": shards[0],
        "e": shards[0],
    }
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in weights(*names).items())


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    save_tensors(tmp_path / "m", stream("a", "b"), max_shard_bytes=1)
    assert len(Checkpoint.open(tmp_path / "m").files) == 2


def test_dtypes_and_memory_layouts(tmp_path: Path) -> None:
    base = torch.arange(64, dtype=torch.uint8).view(8, 8)
    made = {
        f"d{i}": base.view(dtype)
        for i, dtype in enumerate(
            (
                torch.float8_e4m3fn,
                torch.int8,
                torch.int32,
                torch.bfloat16,
                torch.float16,
                torch.float32,
                torch.uint8,
            )
        )
    }
    made = {name: tensor.clone() for name, tensor in made.items()}
    made |= {
        "turned": base.t(),
        "part": base[2:4],
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "also": torch.empty(0),
    }
    made["parameter"] = torch.nn.Parameter(torch.ones(3))
    made["imaginary"] = torch.tensor([1 + 2j]).conj().imag
    save_tensors(tmp_path / "m", made.items())
    checkpoint = Checkpoint.open(tmp_path / "m")
    for name, tensor in made.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        expected = tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
        assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_tied_weights_are_written_under_both_names(tmp_path: Path) -> None:
    tied = torch.randn(4, 4)
    save_tensors(tmp_path / "m", [("embed", tied), ("head", tied), ("rows", tied[1:])])
    loaded = load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(loaded["head"], tied)
    assert torch.equal(loaded["rows"], tied[1:])


def test_from_checkpoint_to_checkpoint(tmp_path: Path) -> None:
    save_tensors(tmp_path / "one", stream("a", "b", "c"))
    with Checkpoint.open(tmp_path / "one") as source:
        save_tensors(
            tmp_path / "two", ((name, source.read(name)) for name in source.tensors), max_shard_bytes=SIZE
        )
    with Checkpoint.open(tmp_path / "two") as copy:
        assert all(torch.equal(copy.read(name), tensor) for name, tensor in weights("a", "b", "c").items())


def test_holds_one_shard_and_the_next_tensor(tmp_path: Path) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for i in range(12):
            tensor = torch.full((64, 64), float(i), dtype=torch.bfloat16)
            alive.add(tensor.untyped_storage())
            most = max(most, len(alive))
            yield f"w{i}", tensor

    save_tensors(tmp_path / "m", counted(), max_shard_bytes=3 * SIZE)
    assert most <= 5


# --- what can go wrong
# -------------------------------------------------------------------------------------------------


def nothing_left(directory: Path) -> bool:
    return only(directory) == []


BAD_TENSORS = {
    "twice": ([("a", torch.ones(1)), ("a", torch.ones(1))], "'a'", "this name twice"),
    "metadata": ([("__metadata__", torch.ones(1))], "__metadata__", "a name that safetensors cannot hold"),
    "number": ([(3, torch.ones(1))], "3", "a name that safetensors cannot hold"),
    "list": ([("a", [1.0])], "'a'", "a list"),
    "meta": ([("a", torch.ones(1, device="meta"))], "'a'", "a tensor without data"),
    "sparse": ([("a", torch.eye(2).to_sparse())], "'a'", "layout torch.sparse_coo"),
    "complex": ([("a", torch.ones(1, dtype=torch.complex128))], "'a'", "dtype torch.complex128"),
    "not a pair": ([torch.ones(3)], "save a checkpoint", "ValueError"),
    "empty": ([], "save a checkpoint", "a stream without a tensor"),
}


@pytest.mark.parametrize(("tensors", "named", "found"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensor(tmp_path: Path, tensors: list, named: str, found: str) -> None:
    with raises(SaveError, named, str(tmp_path / "m"), found=found):
        save_tensors(tmp_path / "m", tensors)
    assert nothing_left(tmp_path)


def test_duplicate_in_another_shard(tmp_path: Path) -> None:
    twice = [("a", torch.ones(64)), ("b", torch.ones(64)), ("a", torch.ones(64))]
    with raises(SaveError, "'a'", found="this name twice"):
        save_tensors(tmp_path / "m", twice, max_shard_bytes=1)
    assert nothing_left(tmp_path)


BAD_OPTIONS = {
    "shard size": ({"max_shard_bytes": 0}, "max_shard_bytes=0"),
    "metadata": ({"metadata": {"k": 1}}, "metadata 'k': 1"),
    "weights": ({"files": {"model.safetensors": b""}}, "a name that the weights need"),
    "index": (
        {"files": {"model.safetensors.index.json": Path("pyproject.toml")}},
        "a name that the weights need",
    ),
    "absent": ({"files": {"absent.json": Path("absent.json")}}, "no file at this path"),
    "outside": ({"files": {"../config.json": b""}}, "leads out of the directory"),
    "absolute": ({"files": {"/config.json": b""}}, "leads out of the directory"),
}


@pytest.mark.parametrize(("options", "found"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_option(tmp_path: Path, options: dict, found: str) -> None:
    with raises(SaveError, str(tmp_path / "m"), found=found):
        save_tensors(tmp_path / "m", stream("a"), **options)
    assert nothing_left(tmp_path)


def test_stream_raises(tmp_path: Path) -> None:
    def broken(error: BaseException) -> Iterator[tuple[str, torch.Tensor]]:
        yield from stream("a", "b")
        raise error

    own = WeightError("quantize 'c'", "NaN", "finite weights")
    with pytest.raises(WeightError) as caught:
        save_tensors(tmp_path / "m", broken(own), max_shard_bytes=1)
    assert caught.value is own
    with raises(
        SaveError, str(tmp_path / "m"), found="the stream of tensors raised ZeroDivisionError: by zero"
    ):
        save_tensors(tmp_path / "m", broken(ZeroDivisionError("by zero")), max_shard_bytes=1)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path / "m", broken(KeyboardInterrupt()), max_shard_bytes=1)
    assert nothing_left(tmp_path)


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = ShardWriter.write, []

    def write(self: ShardWriter, asked: str, name: str, tensor: torch.Tensor) -> None:
        calls.append(name)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, asked, name, tensor)

    monkeypatch.setattr(ShardWriter, "write", write)
    with raises(SaveError, str(tmp_path / "m"), "free space", found="the disk is full"):
        save_tensors(tmp_path / "m", stream("a", "b", "c"), max_shard_bytes=1)
    assert len(calls) == 2
    assert nothing_left(tmp_path)


LIMITED = """
    import resource, sys, torch
    from quantport.checkpoint import save_tensors
    from quantport.errors import SaveError
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        tensors = ((f"w{i}", torch.ones(2_000 * (i + 1))) for i in range(4))
        save_tensors(sys.argv[1], tensors, max_shard_bytes=1)
    except SaveError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of the size of a file there")
def test_the_system_stops_a_write_for_real(tmp_path: Path) -> None:
    """The system lets safetensors write no more than 20,000 bytes of the third shard."""
    code = textwrap.dedent(LIMITED)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m")],
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert "File too large" in done.stdout
    assert nothing_left(tmp_path)


DENIED = {
    "denied": (PermissionError(errno.EACCES, "Permission denied"), "permission denied"),
    "read-only": (OSError(errno.EROFS, "Read-only file system"), "permission denied"),
    "mount point": (OSError(errno.EBUSY, "Device or resource busy"), "cannot be renamed to"),
}


@pytest.mark.parametrize(("error", "found"), DENIED.values(), ids=DENIED)
def test_refused_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, found: str
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("quantport.checkpoint.partial._publish", refuse)
    with raises(SaveError, str(tmp_path / "m"), found=found):
        save_tensors(tmp_path / "m", stream("a"))
    assert nothing_left(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_parent(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(0o555)
    with raises(SaveError, str(parent / "m"), found="permission denied"):
        save_tensors(parent / "m", stream("a"))
    assert nothing_left(parent)


def test_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with raises(SaveError, str(tmp_path / "file" / "m"), found="Error"):
        save_tensors(tmp_path / "file" / "m", stream("a"))
