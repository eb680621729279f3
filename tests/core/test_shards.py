"""A model that is loaded in shards: joined, those of all ranks are what one process loads, bit by bit."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from core_models import Tiny, made, same_bits, write
from core_references import check_parts
from test_sharding import SCHEMES, sizes, weight

import quantport
from quantport import numerics
from quantport.engine import PartialLoad, RankError, Ranks, Shards, join_shards
from quantport.errors import ConfigError, SaveError, UnsupportedError, WeightError
from quantport.kernels.aten import Reference
from quantport.kernels.base import WeightSpec
from quantport.loading.build_context import building
from quantport.modules import QuantLinear
from quantport.numerics.shard_steps import SharedMaxima
from quantport.numerics.sharding import spans_shards
from quantport.scheme.catalog import BUILTIN


class Threads:
    """Ranks of one process, each a thread. One that has ended breaks the wait of the others."""

    def __init__(self, count):
        self.count, self.calls = count, [0] * count
        self._barrier, self._brought = threading.Barrier(count, timeout=30), [None] * count

    def ranks(self, rank):
        def reduce(values):
            self.calls[rank] += 1
            self._brought[rank] = values
            self._barrier.wait()
            out = torch.stack(self._brought).amax(0)
            self._barrier.wait()
            return out

        return Ranks(rank, self.count, reduce)

    def each(self, run):
        """What each rank returns, or raises."""

        def one(rank):
            try:
                return run(self.ranks(rank))
            except Exception as error:  # a rank's error is what is tested
                return error

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))


@pytest.mark.parametrize(
    "name", [name for name in SCHEMES if any(spans_shards(SCHEMES[name], d) for d in (0, 1))]
)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("rows", [1, 1000])
def test_two_passes_make_of_a_shard_what_it_is_of_the_whole(name, dim, rows):
    scheme = SCHEMES[name]
    whole = weight(*sizes(scheme, dim, 2))
    rows *= numerics.sharding.alignment(scheme, 0)
    parts = whole.chunk(2, dim)
    every = [SharedMaxima(scheme, dim, part.shape) for part in parts]

    def reader(part):
        @contextmanager
        def read(start, stop):
            yield part[start:stop]

        return read

    while not every[0].complete:
        for shared, part in zip(every, parts, strict=True):
            shared.find_next(reader(part), rows)
        agreed = torch.maximum(*(shared.found for shared in every))
        for shared in every:
            shared.agree(agreed)
    stored = [
        numerics.by_rows.join_steps(shared.quantize_steps(reader(part), rows), scheme, part.shape)
        for shared, part in zip(every, parts, strict=True)
    ]
    joined = join_shards(stored, scheme, dim)
    for key, tensor in numerics.quantize_weight(whole, scheme).items():
        assert same_bits(joined[key], tensor), key


DIMS = {
    "up": 0,  # 129 rows: 65 and 64
    "down": 1,
    "moe.experts.0.gate_proj": 0,
    "moe.experts.0.down_proj": 1,
    "embed_tokens": 0,
    "lm_head": 0,
}


def as_they_are(names):
    return {name: name for name in names}


def part_of(folder, config, ranks, dims=DIMS):
    with building():
        model = Tiny()
    shards = Shards(ranks, dims)
    with ranks.together("plan"):
        return model, PartialLoad(folder, model, as_they_are, config, torch.bfloat16, "cpu", shards=shards)


def filled(folder, config, ranks, dims=DIMS):
    model, part = part_of(folder, config, ranks, dims)
    part.fill()
    return model


def check_joined(models, whole, dims):
    """The shards of all ranks are what one process has; what is not split is whole on each."""
    for path, module in whole.named_modules():
        if not hasattr(module, "stored_weight"):
            continue
        for name, spec in module.specs.items():
            shards = [model.get_submodule(path).stored_weight(name) for model in models]
            expected, dim = module.stored_weight(name), dims.get(path)
            if "experts" in path and hasattr(module, "num_experts") and dim is not None:
                dim = int(name.endswith("down_proj"))
            joined = shards if dim is None else [join_shards(shards, spec.scheme, dim)]
            for stored in joined:
                assert all(same_bits(stored[key], tensor) for key, tensor in expected.items()), (path, name)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", made())


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    "config",
    ["int8", "fp8_per_tensor", "nvfp4_weight_only", "nf4:double", {"scheme": "int8", "moe": None}],
    ids=str,
)
def test_the_shards_of_all_ranks_are_what_one_process_loads(config, ranks, folder):
    dims = {**DIMS, "down": 0, "moe.experts.0.down_proj": 0} if "4" in str(config) else DIMS
    models = Threads(ranks).each(lambda own: filled(folder, config, own, dims))
    whole = quantport.load(folder, config=config, model=Tiny, device="cpu")
    check_joined(models, whole, dims)
    for rank, model in enumerate(models):
        assert model.quantport_plan.shard == (rank, ranks)
        assert f"rank {rank} of {ranks}" in str(model.quantport_plan)


@pytest.mark.parametrize("scheme", ["int8", "int4_weight_only_g32", "nf4:double", "q8_0"])
def test_weights_that_are_stored_as_codes(scheme, folder, tmp_path):
    dims = {"up": 0, "down": 0, "moe.experts.0.gate_proj": 1 if scheme == "int8" else 0}
    whole = quantport.load(folder, scheme, model=Tiny, device="cpu")
    saved = quantport.save(whole, tmp_path / "saved")
    check_joined(Threads(2).each(lambda own: filled(saved, {}, own, dims)), whole, dims)


def test_columns_of_stored_blocks(tmp_path):
    """Of each tensor its own: codes that share a byte, a scale for each group, one for the weight."""

    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Linear(256, 6), torch.nn.Linear(6, 2))

    folder = write(tmp_path / "model", made(Wide))
    for scheme in ("int4_weight_only", "mxfp4", "nvfp4", "nf4:double", "int4_mse", "fp8_per_block", "q4_0"):
        whole = quantport.load(folder, scheme, model=Wide, device="cpu")
        saved = quantport.save(whole, tmp_path / scheme.replace(":", ""))

        def one(own, saved=saved):
            with building():
                model = Wide()
            shards = Shards(own, {"inner.0": 1})
            PartialLoad(saved, model, as_they_are, {}, torch.bfloat16, "cpu", shards=shards).fill()
            return model

        check_joined(Threads(2).each(one), whole, {"inner.0": 1})


@pytest.mark.parametrize("where", [0, -1])
@pytest.mark.parametrize("scheme", ["int8", "int8_weight_only", "fp8_per_tensor", "int4_weight_only_g32"])
def test_what_one_rank_fails_at_is_an_error_on_all(scheme, where, tmp_path):
    model = made()
    model.up.weight[where, 3] = torch.nan
    threads = Threads(2)
    errors = threads.each(lambda own: filled(write(tmp_path / str(own.rank), model), scheme, own, {"up": 0}))
    bad, good = errors[where], errors[where - 1]
    assert isinstance(bad, WeightError), errors
    check_parts(bad, "up", "NaN or Inf")
    assert isinstance(good, RankError)
    check_parts(good, f"rank {where % 2} has failed")
    assert len(set(threads.calls)) == 1


def test_a_rank_that_finds_no_files_is_an_error_on_all(folder, tmp_path):
    places = [folder, tmp_path / "nowhere"]
    good, bad = Threads(2).each(lambda own: filled(places[own.rank], "int8", own))
    assert isinstance(good, RankError)
    assert not isinstance(bad, RankError)
    check_parts(good, "plan", "rank 1 has failed")


def test_a_rank_that_is_gone(folder):
    def gone(values):
        raise RuntimeError("connection closed")

    with pytest.raises(RankError) as caught:
        filled(folder, "int8", Ranks(0, 2, gone))
    check_parts(caught.value, "plan", "connection closed")


REFUSED = [
    ("int4_weight_only", {"down": 1}, "multiple of 128"),
    ("fp8_per_block", {"moe.experts.0.up_proj": 0}, "multiple of 128"),
    ({"targets": {"embed_tokens": "int8"}}, {"embed_tokens": 0}, "16 bits"),
    ("int8", {"narrow": 1}, "none for the last rank"),
    ("int8:asym", {"down": 1}, "offsets"),
]


@pytest.mark.parametrize(("config", "dims", "said"), REFUSED, ids=str)
def test_what_cannot_be_split_is_refused_by_every_rank_before_a_weight_is_read(config, dims, said, folder):
    threads = Threads(2)
    (path,) = dims
    for error in threads.each(lambda own: part_of(folder, config, own, dims)):
        assert isinstance(error, ConfigError | UnsupportedError), error
        check_parts(error, path, "2 ranks", said)
    assert threads.calls == [1, 1]


def test_a_share_of_a_model_is_not_saved(folder, tmp_path):
    models = Threads(2).each(lambda own: filled(folder, "int8", own))
    for model in models:
        with pytest.raises(SaveError) as caught:
            quantport.save(model, tmp_path / "saved")
        check_parts(caught.value, "a share of the model", "one process")
    assert not (tmp_path / "saved").exists()


def test_the_plan_says_what_the_ranks_compute_otherwise(folder):
    _, part = Threads(2).each(lambda own: part_of(folder, "int8", own))[0]
    notes = {step.layer.name: step.note for step in part.plan.quantized}
    text = "each rank scales its part of the activations by itself"
    assert {name for name, note in notes.items() if text in note} == {"down", "moe.experts.0.down_proj"}
    _, part = Threads(2).each(lambda own: part_of(folder, "int8_weight_only", own))[0]
    assert not any(text in step.note for step in part.plan.quantized)


UNLIKE = [
    (("int4_weight_only_g32", "fp8_weight_only"), ({"up": 0}, {"up": 0})),
    (("int8_weight_only", "fp8_per_tensor"), ({"up": 0, "down": 1}, {"up": 0, "down": 1})),
    (("int8_weight_only", "int8_weight_only"), ({"up": 0}, {"up": 0, "down": 1})),
]


@pytest.mark.parametrize(("configs", "dims"), UNLIKE, ids=str)
def test_ranks_that_plan_something_else_are_told(configs, dims, folder):
    threads = Threads(2)
    for error in threads.each(lambda own: filled(folder, configs[own.rank], own, dims[own.rank])):
        assert isinstance(error, RankError), error
        check_parts(error, "different plans", "scheme by name")
    assert len(set(threads.calls)) == 1


def test_offsets_that_are_stored_are_passed_on(folder, tmp_path):
    whole = quantport.load(folder, "int8_weight_only:asym", model=Tiny, device="cpu")
    saved = quantport.save(whole, tmp_path / "saved")
    check_joined(Threads(2).each(lambda own: filled(saved, {}, own, {"down": 1})), whole, {"down": 1})


def test_what_is_read_to_hold_columns_is_counted(folder):
    def needs(own):
        _, part = part_of(folder, "int8_weight_only", own, {"up": 0, "down": 1})
        filler = part._made.filler
        return {task.module: task.need for task in filler.weight_tasks() if task.module in ("up", "down")}

    one, four = needs(Ranks(0, 1, lambda values: values)), Threads(4).each(needs)[0]
    assert four["up"] < one["up"]
    assert four["down"] >= one["down"]


def test_a_stored_scale_of_activations_is_that_of_all_ranks(folder, tmp_path):
    """So that no rank computes otherwise than one process; offsets and fused weights are no obstacle."""
    scheme = BUILTIN["int8:static"]
    whole = quantport.load(folder, "int8", model=Tiny, device="cpu")
    module = whole.down
    stored = {**module.stored_weight(""), "input_scale": torch.tensor([0.03125])}
    static = QuantLinear(Reference(), WeightSpec(scheme, *module.weight.shape), bias=module.bias)
    static.set_weight("", stored)
    whole.down = static
    saved = quantport.save(whole, tmp_path / "saved")
    parts = Threads(2).each(lambda own: part_of(saved, {}, own, {"down": 1}))
    assert not any(step.note for step in parts[0][1].plan.quantized)
    check_joined(Threads(2).each(lambda own: filled(saved, {}, own, {"down": 1})), whole, {"down": 1})


def test_a_fused_weight_that_is_stored_with_one_scale_is_split(tmp_path):
    class Fused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.ModuleDict({"gate_up_proj": torch.nn.Linear(64, 128, bias=False)})

    weight = torch.randn(128, 64)
    tensors = {
        "inner.gate_up_proj.weight": weight.to(torch.float8_e4m3fn),
        "inner.gate_up_proj.weight_scale": torch.tensor([0.5]),
    }
    described = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    folder = write(tmp_path / "fp8", tensors)
    (folder / "config.json").write_text(json.dumps({"quantization_config": described}))

    def one(own):
        with building():
            model = Fused()
        shards = Shards(own, {"inner.gate_up_proj": 0})
        PartialLoad(folder, model, as_they_are, {}, torch.bfloat16, "cpu", shards=shards).fill()
        return model

    whole = quantport.load(folder, model=Fused, device="cpu")
    check_joined(Threads(2).each(one), whole, {"inner.gate_up_proj": 0})
