"""Files that change while a model loads: an error that names the file, and no model of two checkpoints."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
from core_models import Tiny, made, same_state, write
from core_references import check_parts

import quantport
from quantport.checkpoint import Checkpoint, save_tensors
from quantport.errors import CheckpointError, WeightError


def rewritten(file: Path) -> None:
    """Other values in the same bytes of the same file, as a trainer or a copy in place leaves it."""
    size, raw = file.stat().st_size, bytearray(file.read_bytes())
    raw[-1000:] = bytes(1000)
    with file.open("r+b") as there:
        there.write(raw)
    assert file.stat().st_size == size


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def appended(file: Path) -> None:
    with file.open("ab") as there:
        there.write(b"more")


def replaced(file: Path) -> None:
    """By another file of the same size and time: only the inode tells."""
    status, other = file.stat(), file.with_suffix(".new")
    shutil.copyfile(file, other)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, file)


def removed(file: Path) -> None:
    file.unlink()


CHANGES = [rewritten, truncated, emptied, appended, replaced, removed]


def after(monkeypatch, reads, change, file):
    """Changes a file, of long ago, once so many tensors, or slabs of them, have been read."""
    os.utime(file, ns=(10**18, 10**18))  # clocks of file systems are coarse
    read, count = Checkpoint.read, []

    def counted(self, name, rows=None):
        count.append(name)
        tensor = read(self, name, rows)
        if len(count) == reads:
            change(file)
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)


def shards(folder: Path) -> Path:
    save_tensors(folder, iter(made().state_dict().items()), max_shard_bytes=8000)
    return folder


def plain(folder: Path) -> Path:
    return write(folder, made())


def saved(folder: Path) -> Path:
    return quantport.save(quantport.load(plain(folder / "16"), "int8", model=Tiny), folder / "8")


@pytest.mark.parametrize("reads", [1, 5])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [plain, shards, saved], ids=lambda f: f.__name__)
def test_a_load_says_which_file_changed(kind, change, reads, tmp_path, monkeypatch):
    folder = kind(tmp_path / "c")
    file = max(folder.glob("*.safetensors"))
    after(monkeypatch, reads, change, file)
    with pytest.raises(CheckpointError) as caught:
        quantport.load(folder, None if kind is saved else "int8", model=Tiny, workers=1)
    check_parts(caught.value, file.name)
    assert any(text in caught.value.found for text in ("changed", "shrank", "No such file"))


@pytest.mark.parametrize("change", [rewritten, replaced], ids=lambda f: f.__name__)
def test_a_change_after_the_last_read_is_seen_too(change, tmp_path, monkeypatch):
    folder = plain(tmp_path / "c")
    with monkeypatch.context() as patch:
        reads = []
        read = Checkpoint.read
        patch.setattr(Checkpoint, "read", lambda self, *args: reads.append(1) or read(self, *args))
        quantport.load(folder, "int8", model=Tiny)
    after(monkeypatch, len(reads), change, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="changed since its header was read"):
        quantport.load(folder, "int8", model=Tiny)


def test_what_a_change_leads_to_is_said_to_be_the_change(tmp_path, monkeypatch):
    """NaN in a file that is being written are no fault of the weight."""
    folder = plain(tmp_path / "c")
    monkeypatch.setattr(
        "quantport.loading.weight_tasks.quantize_on",
        lambda *args: appended(folder / "model.safetensors") or _raise(WeightError("a", "NaN", "b")),
    )
    with pytest.raises(CheckpointError, match="changed") as caught:
        quantport.load(folder, "int8", model=Tiny, workers=1)
    assert isinstance(caught.value.__context__, WeightError)


def _raise(error):
    raise error


def test_a_file_that_is_only_read_and_linked_is_no_change(tmp_path, monkeypatch):
    folder = plain(tmp_path / "c")
    file = folder / "model.safetensors"
    expected = quantport.load(folder, "int8", model=Tiny)
    read = Checkpoint.read

    def busy(self, name, rows=None):
        file.read_bytes()
        file.chmod(0o600)
        link = file.with_suffix(f".{threading.get_ident()}")  # several read at a time
        os.link(file, link)
        link.unlink()
        return read(self, name, rows)

    monkeypatch.setattr(Checkpoint, "read", busy)
    same_state(quantport.load(folder, "int8", model=Tiny), expected)


def test_a_checkpoint_verifies_every_file(tmp_path):
    folder = shards(tmp_path / "c")
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.verify()
        assert len(checkpoint.files) > 2
        appended(checkpoint.files[1])
        with pytest.raises(CheckpointError, match=checkpoint.files[1].name):
            checkpoint.verify()
