"""Memory that tensors are read into: used again, but never while a tensor is in it."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_blobs import equal, raises
from safetensors.torch import save_file

from quantport.checkpoint import Checkpoint, streaming
from quantport.checkpoint.streaming import Buffers
from quantport.errors import CheckpointError

MIB = 1 << 20


def write(folder: Path, **sizes: int) -> dict[str, torch.Tensor]:
    """Tensors of so many MiB, all different."""
    made = {
        name: torch.full((size, MIB), i + 1, dtype=torch.uint8)
        for i, (name, size) in enumerate(sizes.items())
    }
    save_file(made, folder / "model.safetensors")
    return made


def test_memory_is_used_again_once_no_tensor_is_in_it(tmp_path: Path) -> None:
    made = write(tmp_path, a=4, b=4, c=3)
    checkpoint = Checkpoint.open(tmp_path)
    first = checkpoint.read("a")
    place = first.data_ptr()
    row = first[2]
    del first
    second = checkpoint.read("b")
    assert second.data_ptr() != place, "a row of it is alive"
    assert equal(row, made["a"][2])
    del row
    third = checkpoint.read("c")
    assert third.data_ptr() == place
    assert equal(second, made["b"])
    assert equal(third, made["c"])


def test_tensors_outlive_their_checkpoint(tmp_path: Path) -> None:
    made = write(tmp_path, a=2, b=2)
    with Checkpoint.open(tmp_path) as checkpoint:
        kept = {name: checkpoint.read(name) for name in made}
    del checkpoint
    assert all(equal(tensor, made[name]) for name, tensor in kept.items())


def test_idle_memory_is_bounded_and_of_the_size_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "IDLE", 10 * MIB)
    buffers = Buffers()
    idle = buffers._idle
    lent = [buffers.lend(4 * MIB) for _ in range(5)]
    lent.clear()
    assert sum(map(len, idle)) == 8 * MIB
    small = buffers.lend(MIB)
    assert not idle, "what does not fit is no longer kept"
    del small
    assert sum(map(len, idle)) == 2 * MIB
    buffers.lend(16 * MIB)
    assert not idle
    tiny = buffers.lend(100)
    assert len(tiny) == 100
    del tiny
    assert not idle


def test_threads_never_share_memory(tmp_path: Path) -> None:
    made = write(tmp_path, **{f"w{i}": 1 + i % 3 for i in range(12)})
    checkpoint = Checkpoint.open(tmp_path)
    wrong: list[str] = []

    def work(seed: int) -> None:
        order, held = random.Random(seed), []
        for _ in range(40):
            name = order.choice(list(made))
            held.append((name, checkpoint.read(name)))
            if len(held) > 2:
                name, tensor = held.pop(order.randrange(len(held)))
                if not torch.equal(tensor[:, ::4096], made[name][:, ::4096]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_file_that_shrinks_is_an_error_and_the_process_lives(tmp_path: Path) -> None:
    write(tmp_path, a=2, b=2)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.read("a")
    os.truncate(tmp_path / "model.safetensors", 3 * MIB)
    with raises(CheckpointError, "'b'", str(tmp_path / "model.safetensors"), found="shrank"):
        checkpoint.read("b")


def test_reads_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reads at most 2 GiB at a time."""
    made = write(tmp_path, a=2)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, start: whole(file, [views[0][:100_001]], start))
    assert equal(Checkpoint.open(tmp_path).read("a"), made["a"])


def test_an_error_of_the_system_names_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a=1)
    checkpoint = Checkpoint.open(tmp_path)

    def fail(*args: object) -> int:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "preadv", fail)
    with raises(CheckpointError, "'a'", found="Stale file handle"):
        checkpoint.read("a")


def test_files_are_closed(tmp_path: Path) -> None:
    write(tmp_path, a=1)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.read("a")
    (opened,) = checkpoint._open_files.values()
    file = opened._file
    del opened
    assert not file.closed
    checkpoint.close()
    assert file.closed
