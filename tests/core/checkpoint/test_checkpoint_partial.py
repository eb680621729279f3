"""A save is complete under its name or not there: names that are taken, replacements, kills."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_blobs import only, raises, stream, weights

from quantport.checkpoint import Checkpoint, save_tensors
from quantport.checkpoint.partial import _host, appearing
from quantport.errors import QuantportError, SaveError

# --- names that are taken


def test_target_may_be_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_tensors(tmp_path / "m", stream("a"))
    assert only(tmp_path / "m") == ["model.safetensors"]


def test_target_may_be_a_link_to_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "m").symlink_to("real")
    save_tensors(tmp_path / "m", stream("a"))
    assert (tmp_path / "m").is_symlink()
    assert only(tmp_path / "real") == ["model.safetensors"]


def test_target_is_taken(tmp_path: Path) -> None:
    pulled = []
    save_tensors(tmp_path / "m", stream("a"))
    (tmp_path / "file").write_text("x")
    for target, found in (("m", "a directory that holds 1 entry"), ("file", "a file of this name")):
        with raises(SaveError, str(tmp_path / target), found=found):
            save_tensors(tmp_path / target, (pulled.append(name) or (name, t) for name, t in stream("b")))
    assert pulled == []
    assert only(tmp_path) == ["file", "m"]


def test_target_that_fills_up_during_the_save_is_kept(tmp_path: Path) -> None:
    def rival() -> Iterator[tuple[str, torch.Tensor]]:
        yield from stream("a")
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "theirs").write_text("x")

    with raises(SaveError, str(tmp_path / "m"), found="a directory that holds 1 entry"):
        save_tensors(tmp_path / "m", rival())
    assert only(tmp_path) == ["m"]
    assert only(tmp_path / "m") == ["theirs"]


def test_overwrite_replaces_a_checkpoint(tmp_path: Path) -> None:
    save_tensors(tmp_path / "m", stream("old"), files={"config.json": b"{}"})
    save_tensors(tmp_path / "m", stream("new"), overwrite=True)
    assert only(tmp_path) == ["m"]
    assert only(tmp_path / "m") == ["model.safetensors"]
    assert set(Checkpoint.open(tmp_path / "m").tensors) == {"new"}


def test_overwrite_from_the_checkpoint_itself(tmp_path: Path) -> None:
    save_tensors(tmp_path / "m", stream("a", "b"))
    with Checkpoint.open(tmp_path / "m") as source:
        save_tensors(tmp_path / "m", ((name, source.read(name)) for name in source.tensors), overwrite=True)
        assert torch.equal(source.read("a"), weights("a", "b")["a"])
    assert torch.equal(Checkpoint.open(tmp_path / "m").read("a"), weights("a", "b")["a"])


def test_overwrite_deletes_no_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with raises(SaveError, str(tmp_path / "home"), found="holds files but no weights"):
        save_tensors(tmp_path / "home", stream("a"), overwrite=True)
    assert only(tmp_path / "home") == ["thesis.tex"]


def test_overwrite_that_fails_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tensors(tmp_path / "m", stream("old"))

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from stream("new")
        raise RuntimeError("boom")

    with raises(SaveError, found="boom"):
        save_tensors(tmp_path / "m", broken(), overwrite=True)
    real = os.rename

    def rename(source: Path, to: Path) -> None:
        if ".partial-" in str(source) and Path(to).name == "m":
            raise OSError(errno.EIO, "Input/output error")
        real(source, to)

    monkeypatch.setattr(os, "rename", rename)
    with raises(SaveError, found="Input/output error"):
        save_tensors(tmp_path / "m", stream("new"), overwrite=True)
    assert only(tmp_path) == ["m"]
    assert set(Checkpoint.open(tmp_path / "m").tensors) == {"old"}


# --- kills

KILLED = """
    import os, signal, sys, torch
    from quantport.checkpoint import save_tensors
    def stream():
        for i in range(3):
            yield f"w{i}", torch.ones(64, 64)
        os.kill(os.getpid(), signal.SIGKILL)
    save_tensors(sys.argv[1], stream(), max_shard_bytes=1, overwrite="overwrite" in sys.argv)
"""


def killed(target: Path, *options: str) -> None:
    """Saves in another process that kills itself when two shards are on the disk."""
    code = textwrap.dedent(KILLED)
    done = subprocess.run(
        [sys.executable, "-c", code, str(target), *options], check=False, timeout=120, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_kill_leaves_nothing_under_the_name_and_the_next_save_cleans_up(tmp_path: Path) -> None:
    killed(tmp_path / "m")
    (left,) = only(tmp_path)
    assert left.startswith(".m.partial-")
    assert [name for name in only(tmp_path / left) if name.endswith(".whole")] == [
        ".shard-00001.whole",
        ".shard-00002.whole",
    ]
    save_tensors(tmp_path / "m", stream("a"))
    assert only(tmp_path) == ["m"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_kill_during_overwrite_keeps_the_old(tmp_path: Path) -> None:
    save_tensors(tmp_path / "m", stream("old"))
    killed(tmp_path / "m", "overwrite")
    assert set(Checkpoint.open(tmp_path / "m").tensors) == {"old"}
    save_tensors(tmp_path / "m", stream("new"), overwrite=True)
    assert only(tmp_path) == ["m"]


# --- resuming

RESUMED = """
    import os, signal, sys, torch
    from quantport.checkpoint import save_tensors
    target, key, stop = sys.argv[1], sys.argv[2], int(sys.argv[3])
    layout = {f"w{i}": ((64, 64), torch.float32) for i in range(4)}
    def fill(missing, write):
        print(*sorted(missing), flush=True)
        for i, name in enumerate(layout):
            if i == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            if name in missing:
                write(name, torch.full((64, 64), float(i)))
    save_tensors(target, fill, layout=layout, max_shard_bytes=1, files={"x.json": b"{}"}, resume=key)
"""


def resumed(target: Path, key: str, stop: int) -> list[str]:
    """Saves four shards in another process, which kills itself before one; the names that were missing."""
    run = [sys.executable, "-c", textwrap.dedent(RESUMED), str(target), key, str(stop)]
    done = subprocess.run(run, check=False, timeout=120, capture_output=True, text=True)
    assert done.returncode == (-signal.SIGKILL if stop < 4 else 0), done.stderr
    return done.stdout.split()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_save_is_resumed_after_its_last_whole_shard(tmp_path: Path) -> None:
    names = ["w0", "w1", "w2", "w3"]
    assert resumed(tmp_path / "m", "key", 3) == names
    (left,) = only(tmp_path)
    (tmp_path / left / "shard-00004.tmp").write_bytes(b"half of it")
    assert resumed(tmp_path / "m", "key", 3) == names[3:]  # killed again, with nothing new
    assert resumed(tmp_path / "m", "key", 4) == names[3:]
    assert only(tmp_path) == ["m"]
    shards = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert only(tmp_path / "m") == [*shards, "model.safetensors.index.json", "x.json"]
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        assert [checkpoint.read(name)[0, 0].item() for name in names] == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_what_another_save_left_is_not_taken_over(tmp_path: Path) -> None:
    resumed(tmp_path / "m", "one", 3)
    assert resumed(tmp_path / "m", "another", 4) == ["w0", "w1", "w2", "w3"]
    resumed(tmp_path / "n", "one", 3)
    save_tensors(tmp_path / "n", stream("a"))  # not resumable
    assert only(tmp_path) == ["m", "n"]
    assert only(tmp_path / "n") == ["model.safetensors"]


def dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


@pytest.mark.skipif(sys.platform == "win32", reason="one cannot ask for a pid there")
def test_only_what_the_dead_left_for_this_name_is_removed(tmp_path: Path) -> None:
    dead = dead_pid()
    kept = [
        f".m.partial-{_host()}-{os.getpid()}-00000000",  # another thread of this process may be at it
        f".m.partial-{_host()}-1-00000000",  # pid 1 runs
        f".m.partial-0000host-{dead}-00000000",  # another machine, for all we know it runs there
        f".other.partial-{_host()}-{dead}-00000000",
        f".m.partial-{dead}",
        "m.partial",
    ]
    stale = [f".m.partial-{_host()}-{dead}-0000000{i}" for i in range(2)]
    for name in kept + stale:
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-00001.tmp").write_text("x")
    save_tensors(tmp_path / "m", stream("a"))
    assert only(tmp_path) == sorted([*kept, "m"])


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
@pytest.mark.parametrize("pid", [1, os.getpid()], ids=["another", "own"])
def test_a_killed_save_is_resumed_by_a_process_of_the_same_pid(tmp_path: Path, pid: int) -> None:
    """As in a container that is started again: there every process begins with the same number."""
    names = ["w0", "w1", "w2", "w3"]
    assert resumed(tmp_path / "m", "key", 3) == names
    (left,) = only(tmp_path)
    os.rename(tmp_path / left, tmp_path / f".m.partial-{_host()}-{pid}-00000000")
    assert resumed(tmp_path / "m", "key", 4) == names[3:]
    assert only(tmp_path) == ["m"]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_what_another_process_holds_is_not_touched(tmp_path: Path) -> None:
    """Whatever its pid is here: a container has numbers of its own."""
    with appearing(tmp_path / "m", overwrite=False, resume="key") as first:
        moved = tmp_path / f".m.partial-{_host()}-{dead_pid()}-00000000"
        os.rename(first, moved)
        save_tensors(tmp_path / "m", stream("a"))
        assert only(tmp_path) == [moved.name, "m"]
        shutil.rmtree(tmp_path / "m")
        os.rename(moved, first)
    assert only(tmp_path) == ["m"]
    assert only(tmp_path / "m") == []


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / f".m.partial-{_host()}-{dead_pid()}-00000000").mkdir()
    save_tensors(tmp_path / "m", stream("a"))
    assert only(tmp_path) == ["m"]
    assert only(tmp_path / "m") == ["model.safetensors"]


def test_a_mount_point_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "m")
    with raises(SaveError, str(tmp_path / "m"), found="a mount point"):
        save_tensors(tmp_path / "m", (pytest.fail(name) for name in "a"))
    assert only(tmp_path) == ["m"]


def test_a_disk_of_unknown_size_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    layout = {"a": ((2,), torch.float32)}
    save_tensors(tmp_path / "m", [("a", torch.ones(2))], layout=layout)
    assert only(tmp_path) == ["m"]


@pytest.mark.skipif(sys.platform == "win32", reason="one cannot ask for a pid there")
def test_kill_between_the_two_renames_of_an_overwrite_is_undone(tmp_path: Path) -> None:
    save_tensors(tmp_path / "m", stream("old"))
    mark = f"{_host()}-{dead_pid()}-00000000"
    os.rename(tmp_path / "m", tmp_path / f".m.replaced-{mark}")
    (tmp_path / f".m.partial-{mark}").mkdir()
    with raises(SaveError, found="a directory that holds 1 entry"):
        save_tensors(tmp_path / "m", stream("new"))
    assert only(tmp_path) == ["m"]
    assert set(Checkpoint.open(tmp_path / "m").tensors) == {"old"}


def test_two_saves_at_once_to_one_name(tmp_path: Path) -> None:
    with pytest.raises(QuantportError), appearing(tmp_path / "m", overwrite=False) as first:  # noqa: PT012
        (first / "x").write_text("1")
        save_tensors(tmp_path / "m", stream("a"))
    assert only(tmp_path) == ["m"]
    assert set(Checkpoint.open(tmp_path / "m").tensors) == {"a"}
