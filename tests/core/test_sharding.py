"""Stored bytes do not depend on the number of ranks: shards joined are the whole, for every scheme, both ways
of splitting.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from core_models import MOE, same_bits, same_state
from core_references import check_parts, randn
from safetensors.torch import save_file

import quantport
from quantport import numerics
from quantport.checkpoint import Checkpoint
from quantport.errors import ConfigError, WeightError
from quantport.numerics.sharding import alignment, join_shards, quantize_shard, shard_dims
from quantport.scheme import Quant, Scheme
from quantport.scheme.catalog import BUILTIN

OPTIONS = ("mxfp4:hadamard", "nf4:double", "nvfp4:mse", "mxfp4:floor", "int4_weight_only:hadamard")
EXTRA = (
    Scheme("int4_per_row", Quant("int4", (1, 0), "bf16"), None, ""),
    Scheme("columns", Quant("int8", (0, 32)), None, ""),
)
SCHEMES = {**BUILTIN, **{name: BUILTIN[name] for name in OPTIONS}, **{s.name: s for s in EXTRA}}


class Ranks:
    """Ranks of one process: threads that wait for each other, and take the maximum of what each brings."""

    def __init__(self, count):
        self.count, self.barrier = count, threading.Barrier(count, timeout=30)
        self.brought, self.calls = [None] * count, [0] * count

    def reduce(self, rank):
        def maximum(values):
            self.calls[rank] += 1
            self.brought[rank] = values
            self.barrier.wait()
            out = torch.stack(self.brought).amax(0)
            self.barrier.wait()
            return out

        return maximum

    def quantize(self, shards, scheme, dim, **options):
        """What each rank got: its tensors, or its error."""

        def one(rank):
            try:
                return quantize_shard(
                    shards[rank], scheme, dim, reduce=self.reduce(rank), place=(rank, self.count), **options
                )
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))


@cache
def weight(n, k):
    """Rows and columns of very different size, so that no scale of a shard is that of the whole by chance."""
    rows, columns = torch.logspace(-2, 1, n)[:, None], torch.logspace(1, -1, k)
    return (randn(n, k) * rows * columns * 0.02).bfloat16()


def sizes(scheme, dim, ranks):
    """A weight whose shards are three blocks each, or 24 where the scheme has no blocks."""
    along = ranks * max(
        24, 3 * alignment(scheme, dim) if alignment(scheme, dim) < 256 else alignment(scheme, dim)
    )
    return (along, 80) if dim == 0 else (8, along)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_joined_are_the_whole(name, dim):
    scheme = SCHEMES[name]
    n, k = sizes(scheme, dim, 8)
    whole = numerics.quantize_weight(weight(n, k), scheme)
    for ranks in (1, 2, 4, 8):
        parts = Ranks(ranks).quantize(weight(n, k).chunk(ranks, dim), scheme, dim)
        joined = join_shards(parts, scheme, dim)
        assert joined.keys() == whole.keys()
        for key, tensor in whole.items():
            assert same_bits(joined[key], tensor), (ranks, key)


def test_without_the_reduction_they_are_not():
    """That the weights above tell a reduced scale from a local one."""
    for name, dim in (("fp8_per_tensor", 0), ("int8", 1), ("nvfp4", 0), ("nf4:double", 1)):
        scheme = SCHEMES[name]
        n, k = sizes(scheme, dim, 2)
        shards = [quantize_shard(s, scheme, dim, reduce=lambda t: t) for s in weight(n, k).chunk(2, dim)]
        whole = numerics.quantize_weight(weight(n, k), scheme)
        first = {
            key: t.narrow(d, 0, shards[0][key].shape[d])
            if (d := shard_dims(scheme, dim)[key]) is not None
            else t
            for key, t in whole.items()
        }
        second = {
            key: t.narrow(d, t.shape[d] // 2, t.shape[d] // 2)
            if (d := shard_dims(scheme, dim)[key]) is not None
            else t
            for key, t in whole.items()
        }
        same = [
            all(same_bits(s[key], want[key]) for key in whole)
            for s, want in zip(shards, (first, second), strict=True)
        ]
        assert not all(same), name


BLOCKS = [(name, dim) for name in SCHEMES for dim in (0, 1) if alignment(SCHEMES[name], dim) > 1]


@pytest.mark.parametrize(("name", "dim"), BLOCKS)
def test_a_block_in_two_shards_is_refused_by_every_rank(name, dim):
    scheme = SCHEMES[name]
    step = alignment(scheme, dim)
    shape = (step + step // 2, 80) if dim == 0 else (8, step + step // 2)
    errors = Ranks(3).quantize([weight(*shape)] * 3, scheme, dim)
    assert all(isinstance(e, ConfigError) for e in errors[:2])
    check_parts(errors[0], name.partition(":")[0], f"multiple of {step}")
    check_parts(errors[2], "another rank" if not scheme.rotation or dim == 0 else "multiple of")


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_of_different_size_and_a_last_block_that_is_short(name, dim):
    scheme = SCHEMES[name]
    step = alignment(scheme, dim)
    rest = 7 if not scheme.rotation or dim == 0 else step
    first, second = step * (2 if step > 1 else 5), step + rest
    n, k = (first + second, 80) if dim == 0 else (8, first + second)
    joined = join_shards(
        Ranks(2).quantize(weight(n, k).split((first, second), dim), scheme, dim), scheme, dim
    )
    for key, tensor in numerics.quantize_weight(weight(n, k), scheme).items():
        assert same_bits(joined[key], tensor), key
    (whole,) = Ranks(1).quantize([weight(9, 77)], scheme, dim)
    assert all(same_bits(whole[key], t) for key, t in numerics.quantize_weight(weight(9, 77), scheme).items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["fp8_per_tensor", "fp8_per_block", "int8", "nvfp4", "nf4:double", "mxfp4_dualscale", "q4_k"]
)
@pytest.mark.parametrize("dim", [0, 1])
def test_what_is_not_finite_on_one_rank_is_an_error_on_all(name, dim, value):
    scheme = SCHEMES[name]
    n, k = sizes(scheme, dim, 4)
    bad = weight(n, k).clone()
    bad[-1, -1] = value
    ranks = Ranks(4)
    errors = ranks.quantize(bad.chunk(4, dim), scheme, dim, name="a.b")
    assert all(isinstance(e, WeightError) for e in errors), errors
    assert len(set(ranks.calls)) == 1, "every rank took part in every reduction"
    check_parts(errors[-1], "a.b", "NaN or Inf")
    parts = Ranks(4).quantize(bad.chunk(4, dim), scheme, dim, nonfinite="zero")
    bad[-1, -1] = 0
    whole = numerics.quantize_weight(bad, scheme)
    assert all(same_bits(join_shards(parts, scheme, dim)[key], t) for key, t in whole.items())


BAD = {
    "no matrix": lambda w: w[0],
    "integers": lambda w: w.to(torch.int8),
    "nothing": lambda w: w[:0],
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_shard_on_one_rank_is_an_error_on_all(what):
    shards = [weight(256, 80)[:128], BAD[what](weight(256, 80))]
    ranks = Ranks(2)
    good, bad = ranks.quantize(shards, BUILTIN["fp8_per_block"], 0)
    assert ranks.calls == [1, 1]
    check_parts(bad, "fp8_per_block")
    check_parts(good, "another rank")


def test_bad_arguments():
    for dim in (2, -1, None):
        with pytest.raises(ConfigError) as caught:
            quantize_shard(weight(8, 8), BUILTIN["int8"], dim, reduce=lambda t: t)
        check_parts(caught.value, str(dim))
    with pytest.raises(ConfigError) as caught:
        quantize_shard(weight(8, 8), BUILTIN["int8"], 0)
    check_parts(caught.value, "not initialized", "reduce=")
    shards = [
        quantize_shard(w, BUILTIN["fp8_per_tensor"], 0, reduce=lambda t: t) for w in weight(8, 8).chunk(2)
    ]
    with pytest.raises(WeightError, match="weight_scale differs"):
        join_shards(shards, BUILTIN["fp8_per_tensor"], 0)


WORKER = """
import sys, torch, torch.distributed as dist
from quantport import numerics
from quantport.scheme.catalog import BUILTIN
from quantport.errors import WeightError
from quantport.numerics.sharding import alignment, quantize_shard

rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
out = {}
for name in [*BUILTIN, "nf4:double", "mxfp4:hadamard"]:
    scheme = BUILTIN[name]
    for dim in (0, 1):
        weight = torch.load(f"{folder}/{name}.{dim}.pt")
        stored = quantize_shard(weight.chunk(ranks, dim)[rank], scheme, dim)
        plain = {k: t.view(torch.uint8) if t.dtype.itemsize == 1 else t for k, t in stored.items()}
        out[f"{name}.{dim}"] = plain
poisoned = torch.full((16, 64), float("nan")) if rank == ranks - 1 else torch.ones(16, 64)
for name in ("int8", "fp8_per_tensor"):
    try:
        quantize_shard(poisoned, BUILTIN[name], 0, name="poisoned")
        out[name] = ""
    except WeightError as error:
        out[name] = str(error)
torch.save(out, f"{folder}/{rank}.out")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes(ranks, tmp_path):
    """With gloo: the same bytes as one process, and a NaN on the last rank is an error on each."""
    names = [(name, dim) for name in [*BUILTIN, "nf4:double", "mxfp4:hadamard"] for dim in (0, 1)]
    for name, dim in names:
        torch.save(weight(*sizes(BUILTIN[name], dim, ranks)), tmp_path / f"{name}.{dim}.pt")
    command = [sys.executable, "-W", "ignore", "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(r), str(ranks), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(ranks)
    ]
    try:
        said = [w.communicate(timeout=120)[0] for w in workers]
    finally:
        for w in workers:
            w.kill()
    assert not any(w.returncode for w in workers), said
    out = [torch.load(tmp_path / f"{r}.out") for r in range(ranks)]
    for name, dim in names:
        scheme = BUILTIN[name]
        joined = join_shards([o[f"{name}.{dim}"] for o in out], scheme, dim)
        for key, tensor in numerics.quantize_weight(weight(*sizes(scheme, dim, ranks)), scheme).items():
            assert same_bits(joined[key].view(tensor.dtype), tensor), (name, dim, key)
    assert all("poisoned" in o[name] for o in out for name in ("int8", "fp8_per_tensor"))


def test_the_order_of_a_checkpoint_changes_no_byte(tmp_path):
    """Tensors reversed, and dealt out to files of which the first holds what the model needs last."""
    with Checkpoint.open(MOE) as checkpoint:
        tensors = {name: checkpoint.read(name).clone() for name in checkpoint.tensors}
    names = list(reversed(tensors))
    (tmp_path / "config.json").write_text((MOE / "config.json").read_text())
    weight_map = {}
    for i in range(3):
        save_file({n: tensors[n] for n in names[i::3]}, tmp_path / f"part-{2 - i}.safetensors")
        weight_map |= dict.fromkeys(names[i::3], f"part-{2 - i}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    config = {
        "scheme": "int8",
        "moe": "nvfp4_weight_only",
        "targets": {"*.o_proj": "fp8_per_tensor", "lm_head": "int4_mse"},
    }
    same_state(quantport.load(tmp_path, config=config), quantport.load(MOE, config=config))
