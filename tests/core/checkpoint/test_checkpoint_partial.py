"""A save is complete under its name or not there: names that are taken, replacements, kills."""

from __future__ import annotations

import errno
import os
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
    for target, found in (("m", "a directory that holds 1 entries"), ("file", "a file of this name")):
        with raises(SaveError, str(tmp_path / target), found=found):
            save_tensors(tmp_path / target, (pulled.append(name) or (name, t) for name, t in stream("b")))
    assert pulled == []
    assert only(tmp_path) == ["file", "m"]


def test_target_that_fills_up_during_the_save_is_kept(tmp_path: Path) -> None:
    def rival() -> Iterator[tuple[str, torch.Tensor]]:
        yield from stream("a")
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "theirs").write_text("x")

    with raises(SaveError, str(tmp_path / "m"), found="a directory that holds 1 entries"):
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
    assert len(only(tmp_path / left)) == 2
    save_tensors(tmp_path / "m", stream("a"))
    assert only(tmp_path) == ["m"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_kill_during_overwrite_keeps_the_old(tmp_path: Path) -> None:
    save_tensors(tmp_path / "m", stream("old"))
    killed(tmp_path / "m", "overwrite")
    assert set(Checkpoint.open(tmp_path / "m").tensors) == {"old"}
    save_tensors(tmp_path / "m", stream("new"), overwrite=True)
    assert only(tmp_path) == ["m"]


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


@pytest.mark.skipif(sys.platform == "win32", reason="one cannot ask for a pid there")
def test_kill_between_the_two_renames_of_an_overwrite_is_undone(tmp_path: Path) -> None:
    save_tensors(tmp_path / "m", stream("old"))
    mark = f"{_host()}-{dead_pid()}-00000000"
    os.rename(tmp_path / "m", tmp_path / f".m.replaced-{mark}")
    (tmp_path / f".m.partial-{mark}").mkdir()
    with raises(SaveError, found="a directory that holds 1 entries"):
        save_tensors(tmp_path / "m", stream("new"))
    assert only(tmp_path) == ["m"]
    assert set(Checkpoint.open(tmp_path / "m").tensors) == {"old"}


def test_two_saves_at_once_to_one_name(tmp_path: Path) -> None:
    with pytest.raises(QuantportError), appearing(tmp_path / "m", overwrite=False) as first:  # noqa: PT012
        (first / "x").write_text("1")
        save_tensors(tmp_path / "m", stream("a"))
    assert only(tmp_path) == ["m"]
    assert set(Checkpoint.open(tmp_path / "m").tensors) == {"a"}
