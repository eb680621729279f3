"""From a checkpoint to a quantized one without the model in memory: the bytes of load and save."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from core_models import DENSE, MOE, Tiny, made, write
from core_references import check_parts
from torch import nn

import quantport
from quantport.checkpoint import Checkpoint
from quantport.checkpoint.shard import ShardWriter
from quantport.errors import BudgetError, CheckpointError, ConfigError, SaveError
from quantport.loading import fill_model, quantize_checkpoint, weight_tasks
from quantport.loading.save_model import write_model
from quantport.modules import QuantModule
from quantport.planning import memory
from quantport.plugins.registry import Registry

module = sys.modules[quantize_checkpoint.__module__]


def same_files(found: Path, expected: Path) -> None:
    names = sorted(p.name for p in expected.iterdir())
    assert sorted(p.name for p in found.iterdir()) == names
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


CASES = [
    (DENSE, {"scheme": "int8"}),
    (
        DENSE,
        {
            "scheme": "int4",
            "config": {"targets": {"*.q_proj": "fp8", "lm_head": "int4", "model.embed_tokens": "int4"}},
        },
    ),
    (DENSE, {"config": {"scheme": "fp8_per_tensor", "kv_cache_dtype": "fp8"}}),
    (MOE, {"scheme": "fp8_per_block"}),
    (MOE, {"config": {"moe": "int4_g32", "linear": None, "ignore": ["*.experts.3.down_proj"]}}),
    (MOE, {"config": {"linear": "int8", "moe": None}, "dtype": torch.float16}),
]


@pytest.mark.filterwarnings("ignore:.*of the bytes of matrices are quantized:UserWarning")
@pytest.mark.parametrize(("path", "options"), CASES, ids=str)
def test_the_bytes_of_load_and_save(path, options, tmp_path):
    plan = quantize_checkpoint(path, tmp_path / "streamed", max_shard_bytes=1_000_000, **options)
    model = quantport.load(path, **options)
    quantport.save(model, tmp_path / "saved", max_shard_bytes=1_000_000)
    same_files(tmp_path / "streamed", tmp_path / "saved")
    assert plan.after == model.quantport_plan.after


def test_any_module(tmp_path):
    """Experts as modules of their own, biases, a buffer of the file; and FP32 that stays FP32."""

    def factory():
        model = Tiny().bfloat16()
        model.norm.float()
        return model

    folder = write(tmp_path / "c", {**made().state_dict(), "norm.weight": torch.ones(129)})
    quantize_checkpoint(folder, tmp_path / "streamed", "int8", model=factory)
    quantport.save(quantport.load(folder, "int8", model=factory), tmp_path / "saved")
    same_files(tmp_path / "streamed", tmp_path / "saved")
    with Checkpoint.open(tmp_path / "streamed") as checkpoint:
        assert checkpoint.tensors["norm.weight"].dtype is torch.float32


@pytest.mark.parametrize(
    ("path", "config"),
    [(DENSE, {"scheme": "int8"}), (MOE, {"scheme": "int4_g32"}), (MOE, {"linear": "int8", "moe": None})],
    ids=["dense", "experts", "experts that stay"],
)
def test_no_weight_is_ever_whole(path, config, tmp_path, monkeypatch):
    """What is written comes in steps, and the model stays empty: only what is in flight is in memory."""
    quantport.save(quantport.load(path, config=config), tmp_path / "saved")
    step, pieces, models, write_piece = 32 << 10, {}, [], ShardWriter.write
    monkeypatch.setattr(memory, "STEP", step)
    monkeypatch.setattr(weight_tasks, "_step_rows", weight_tasks._step_rows.__wrapped__)  # which remembers
    monkeypatch.setattr(fill_model, "SLAB", step)

    def written(self, asked, name, tensor):
        pieces.setdefault(name, []).append(tensor.nbytes)
        write_piece(self, asked, name, tensor)

    def streamed(model, *args, **options):
        models.append(model)
        return write_model(model, *args, **options)

    monkeypatch.setattr(ShardWriter, "write", written)
    monkeypatch.setattr(module, "write_model", streamed)
    quantize_checkpoint(path, tmp_path / "streamed", config=config)
    same_files(tmp_path / "streamed", tmp_path / "saved")
    assert max(map(max, pieces.values())) <= step
    assert max(map(sum, pieces.values())) > 4 * step
    assert all(parameter.is_meta or not parameter.numel() for parameter in models[0].parameters())
    assert not any(m._buffer_names for m in models[0].modules() if isinstance(m, QuantModule))


def test_a_tensor_without_elements_is_written_too(tmp_path):
    class Empty(Tiny):
        def __init__(self):
            super().__init__()
            self.register_buffer("none", torch.zeros(0, 3, dtype=torch.float32, device="cpu"))

    none = torch.zeros(0, 3, dtype=torch.float32, device="cpu")
    folder = write(tmp_path / "c", {**made().state_dict(), "none": none})
    quantize_checkpoint(folder, tmp_path / "streamed", "int8", model=Empty)
    quantport.save(quantport.load(folder, "int8", model=Empty), tmp_path / "saved")
    same_files(tmp_path / "streamed", tmp_path / "saved")


def test_a_disk_that_is_full_in_the_middle_says_so(tmp_path, monkeypatch):
    def full(self, asked, name, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(SaveError) as caught:
        quantize_checkpoint(DENSE, tmp_path / "out", "int8")
    check_parts(caught.value, "the disk is full")
    nothing_left(tmp_path)


class Tied(nn.Module):
    """Two layers of one weight, one at each end, and one between."""

    def __init__(self):
        super().__init__()
        self.first, self.middle = nn.Embedding(16, 32), nn.Linear(32, 32, bias=False)
        self.last = nn.Linear(32, 16, bias=False)
        self.last.weight = self.first.weight


@pytest.mark.parametrize("stored", [["first"], ["last"], ["first", "last"]], ids="-".join)
def test_what_is_tied_is_written_once_whatever_it_is_stored_under(stored, tmp_path):
    weight = torch.randn(16, 32, dtype=torch.bfloat16, device="cpu")
    tensors = {"middle.weight": torch.randn(32, 32, dtype=torch.bfloat16, device="cpu")}
    folder = write(tmp_path / "c", {**tensors, **{f"{name}.weight": weight.clone() for name in stored}})
    quantize_checkpoint(folder, tmp_path / "streamed", "int8", model=Tied)
    quantport.save(quantport.load(folder, "int8", model=Tied), tmp_path / "saved")
    same_files(tmp_path / "streamed", tmp_path / "saved")


def test_files_that_change_meanwhile_leave_nothing(tmp_path, monkeypatch):
    folder = write(tmp_path / "c", made())
    os.utime(folder / "model.safetensors", ns=(10**18, 10**18))  # clocks of file systems are coarse
    finish = ShardWriter.finish

    def finished(self):
        os.utime(folder / "model.safetensors")
        finish(self)

    monkeypatch.setattr(ShardWriter, "finish", finished)
    with pytest.raises(CheckpointError) as caught:
        quantize_checkpoint(folder, tmp_path / "out", "int8", model=Tiny)
    check_parts(caught.value, "model.safetensors")
    nothing_left(tmp_path)


def test_progress_counts_everything_once(tmp_path):
    seen = []
    quantize_checkpoint(DENSE, tmp_path / "out", "int8", progress=lambda *args: seen.append(args))
    done = [some for some, _, _ in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1] == Checkpoint.open(DENSE).total_bytes


def nothing_left(tmp_path):
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith((".", "out"))] == []


def test_what_cannot_be_done_leaves_nothing(tmp_path, monkeypatch):
    lacking = write(tmp_path / "c", {k: t for k, t in made().state_dict().items() if k != "norm.bias"})
    with pytest.raises(CheckpointError) as caught:
        quantize_checkpoint(lacking, tmp_path / "out", "int8", model=Tiny)
    check_parts(caught.value, "norm.bias")
    done = quantport.save(quantport.load(DENSE, "int8"), tmp_path / "done")
    with pytest.raises(ConfigError) as caught:
        quantize_checkpoint(done, tmp_path / "out", "nf4")
    check_parts(caught.value, "quantized already")
    with pytest.raises(SaveError):
        quantize_checkpoint(DENSE, tmp_path / "done", "int8")
    registry = Registry()
    monkeypatch.setattr(registry.backends["cpu"], "memory", lambda device: 1000)
    with pytest.raises(BudgetError):
        quantize_checkpoint(DENSE, tmp_path / "out", "int8", registry=registry)
    nothing_left(tmp_path)


def test_no_weight_is_read_where_the_disk_has_no_room(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(Checkpoint, "read", lambda *args: pytest.fail("read"))
    with pytest.raises(SaveError) as caught:
        quantize_checkpoint(DENSE, tmp_path / "out", "int8")
    check_parts(caught.value, "GB are free")
    nothing_left(tmp_path)


KILLED = """
import os, signal, sys
from quantport.checkpoint.shard import ShardWriter
from quantport.loading import quantize_checkpoint

left, finish = [int(sys.argv[4])], ShardWriter.finish
def counted(self):
    finish(self)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
ShardWriter.finish = counted
read = []
quantize_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3], max_shard_bytes=1_000_000,
                    progress=lambda done, total, name: read.append(total))
print(read[-1])
"""


def quantized(path: Path, out: Path, scheme: str, shards: int) -> int | None:
    """Quantizes in another process, which is killed when so many shards are whole; bytes that it read."""
    run = [sys.executable, "-c", KILLED, str(path), str(out), scheme, str(shards)]
    done = subprocess.run(run, check=False, timeout=300, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return int(done.stdout) if done.returncode == 0 else None


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_kill_costs_what_was_not_whole(tmp_path):
    assert quantized(DENSE, tmp_path / "out", "int8", 3) is None
    assert not (tmp_path / "out").exists()
    read = quantized(DENSE, tmp_path / "out", "int8", -1)
    assert read is not None
    assert read < 0.8 * Checkpoint.open(DENSE).total_bytes
    quantize_checkpoint(DENSE, tmp_path / "whole", "int8", max_shard_bytes=1_000_000)
    same_files(tmp_path / "out", tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_another_scheme_or_a_changed_source_begins_anew(tmp_path):
    with Checkpoint.open(DENSE) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    source = write(tmp_path / "c", tensors, config__json=(DENSE / "config.json").read_text())
    total = Checkpoint.open(source).total_bytes
    quantized(source, tmp_path / "out", "int8", 2)
    assert quantized(source, tmp_path / "out", "fp8_per_channel", -1) == total
    quantized(source, tmp_path / "two", "int8", 2)
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes())
    assert quantized(source, tmp_path / "two", "int8", -1) == total
    quantized(source, tmp_path / "three", "int8", 2)
    before = file.stat()
    other = file.with_suffix(".other")
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))  # as of an archive or an image
    os.replace(other, file)
    assert quantized(source, tmp_path / "three", "int8", -1) == total
