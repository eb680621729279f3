"""Limits at the edge: what a few bytes claim is refused at once, in little memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoint_blobs import blob, check_parts, entry, weights
from safetensors.torch import save_file
from torch import nn

import quantport
from quantport.checkpoint import Checkpoint, limits, read_config
from quantport.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory):
    """What a first plan imports is not what a checkpoint takes."""
    plan(small(tmp_path_factory.mktemp("first")))


@contextmanager
def refused(*named: str, found: str, megabytes: float = 20):
    """The error, in little time and memory."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(CheckpointError) as caught:
            yield
        peak = tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
    check_parts(caught.value, *named, found=found)
    assert peak < megabytes, peak
    assert time.perf_counter() - start < 20


def plan(path: Path):
    return quantport.plan(path, "int8", device="cpu")


def headers(folder: Path, tensors: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(blob(tensors))
    return folder


def small(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(weights("a.weight"), folder / "model.safetensors")
    return folder


def test_millions_of_experts_in_a_few_bytes(tmp_path):
    stacked = {"experts.down_proj": entry("BF16", [3_000_000, 2, 1], 0, 12_000_000)}
    assert len(blob(stacked)) < 250
    with refused("experts.down_proj", f"{limits.MAX_EXPERTS:,}", found="3,000,000 experts"):
        plan(headers(tmp_path, stacked))


def test_an_expert_of_a_number_that_is_too_large(tmp_path):
    single = {"experts.900000000.gate_proj.weight": entry("BF16", [2, 2], 0, 8)}
    with refused("experts.900000000", found="900,000,001 experts"):
        plan(headers(tmp_path, single))


def test_experts_of_many_layers_add_up(tmp_path):
    size = 16_000 * 4
    tensors = {
        f"layers.{i}.experts.down_proj": entry("BF16", [16_000, 2, 1], i * size, (i + 1) * size)
        for i in range(40)
    }
    with refused(found="640,000 experts"):
        plan(headers(tmp_path, tensors))


@pytest.mark.parametrize("name", ["layers.{}.weight", "experts.{}.up_proj.weight", "{}"])
def test_numbers_without_end_in_a_name(tmp_path, name):
    with refused(found="900 digits"):
        plan(headers(tmp_path, {name.format("9" * 900): entry("BF16", [2, 2], 0, 8)}))
    with refused(found=f"{len(name) + 4998:,} characters in the name"):
        plan(headers(tmp_path, {name.format("9" * 5000): entry("BF16", [2, 2], 0, 8)}))


def test_an_index_of_very_many_files(tmp_path):
    weight_map = {f"layers.{i}.weight": f"model-{i}.safetensors" for i in range(limits.MAX_FILES + 1)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with refused(INDEX, f"at most {limits.MAX_FILES:,}", found="20,001 files named by the index"):
        plan(tmp_path)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"num_hidden_layers": 10**13}, "10,000,000,000,000 as num_hidden_layers"),
        ({"text_config": {"num_hidden_layers": 1e13}}, "more than 10,000 as num_hidden_layers"),
        ({"n_layer": 10**5}, "100,000 as n_layer"),
        ({"parts": [{"num_local_experts": 10**5}]}, "100,000 as num_local_experts"),
        ({"depths": [2, 10**9]}, "1,000,000,000 as depths"),
        ({"backbone_config": {"num_block_repeats": [[10**5]]}}, "100,000 as num_block_repeats"),
        ({"attention_types": [[["global", "local"], 10**8]]}, "100,000,000 as attention_types"),
        ({"text_config": {"num_labels": 10**8}}, "100,000,000 as num_labels"),
        ({"text_config": {"max_position_embeddings": 10**9}}, "1,000,000,000 as max_position_embeddings"),
        ({"n_positions": 1e12}, "more than 67,108,864 as n_positions"),
        ({"max_source_positions": 10**9}, "1,000,000,000 as max_source_positions"),
        ({"inner_group_num": 10**6}, "1,000,000 as inner_group_num"),
        ({"hidden_size": 10**4000}, "as hidden_size"),
        ({"text_config": {"head_dim": -(10**30)}}, "as head_dim"),
    ],
)
def test_layers_and_experts_of_a_configuration(tmp_path, config, found):
    (small(tmp_path) / "config.json").write_text(json.dumps(config))
    with refused("config.json", found=found):
        plan(tmp_path)
    with refused("config.json", found=found):
        quantport.load(tmp_path, "int8", model=lambda: pytest.fail("built"), device="cpu")


@pytest.mark.parametrize(
    "config",
    [{"x": [{}] * 250_002}, {"id2label": {str(i): "" for i in range(250_002)}}, {"x": {"y": [1] * 250_002}}],
    ids=["objects", "labels", "numbers"],
)
def test_a_configuration_of_very_many_values_is_not_parsed(tmp_path, config):
    (small(tmp_path) / "config.json").write_text(json.dumps(config))
    with refused("config.json", f"at most {limits.MAX_CONFIG_VALUES:,}", found="250,001 values in JSON"):
        plan(tmp_path)


def test_a_configuration_of_a_real_model_is_within(tmp_path):
    config = {"num_hidden_layers": 128, "layer_norm_eps": 1e-5, "num_experts": 512, "time_step": float("inf")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == config
    assert read_config(tmp_path / "absent") == {}


@pytest.mark.parametrize("file", [INDEX, "config.json", "quantport.json"])
def test_json_of_many_bytes_is_not_even_read(tmp_path, file):
    with (small(tmp_path) / file).open("wb") as stream:
        stream.truncate(60_000_000)
    with refused(file, found="60,000,000 bytes of JSON", megabytes=2):
        plan(tmp_path / INDEX if file == INDEX else tmp_path)


@pytest.mark.parametrize("file", [INDEX, "config.json", "quantport.json"])
def test_json_of_many_empty_objects_is_not_parsed(tmp_path, file):
    (small(tmp_path) / file).write_bytes(b'{"x": [' + b"{}," * 6_600_000 + b"{}]}")
    with refused(file, found="objects and lists", megabytes=60):
        plan(tmp_path / INDEX if file == INDEX else tmp_path)


def test_a_header_of_many_values_is_not_parsed(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(blob(b'{"x": [' + b"1," * 5_000_000 + b"1]}"))
    with refused("model.safetensors", found="5,000,000 values", megabytes=60):
        Checkpoint.open(tmp_path)


def test_json_that_is_nested_too_deep(tmp_path):
    (small(tmp_path) / "config.json").write_bytes(b'{"x":' * 100 + b"1" + b"}" * 100)
    with refused("config.json", found="65 levels"):
        plan(tmp_path)


def test_json_that_names_a_key_twice(tmp_path):
    (small(tmp_path) / "config.json").write_bytes(b'{"num_layers": 1, "num_layers": 2}')
    with refused("config.json", found="'num_layers' twice"):
        plan(tmp_path)


def test_experts_of_a_record(tmp_path):
    layer = {"scheme": "int8", "kind": "moe", "weights": [["gate_proj", 1, 1]], "experts": 2e7}
    (small(tmp_path) / "quantport.json").write_text(json.dumps({"layers": {"experts": layer}}))
    with refused("quantport.json", found="layers.experts.experts"):
        quantport.load(tmp_path, model=nn.Identity, device="cpu")


@pytest.mark.parametrize("weight", [["a", 10**30, 1], ["a", 1, -1], ["a", 1.5, 1], ["a", 1], 3])
def test_sizes_of_a_record(tmp_path, weight):
    layer = {"scheme": "int8", "kind": "linear", "weights": [weight]}
    (small(tmp_path) / "quantport.json").write_text(json.dumps({"layers": {"a": layer}}))
    with refused("quantport.json", found="layers.a.weights"):
        quantport.load(tmp_path, model=nn.Identity, device="cpu")


def test_names_without_end(tmp_path):
    with refused(found="5,000 characters"):
        plan(headers(tmp_path, {"x" * 5000: entry("BF16", [2, 2], 0, 8)}))


def test_tensors_are_counted():
    many = dict.fromkeys(map(str, range(500_001)), torch.empty(0))
    with refused(found="500,001 tensors"):
        limits.check_tensors(many, "open it")


def test_tensors_of_all_shards_are_counted(tmp_path, monkeypatch):
    save_file(weights("a", "b"), tmp_path / "model-00001-of-00002.safetensors")
    save_file(weights("c", "d"), tmp_path / "model-00002-of-00002.safetensors")
    monkeypatch.setattr(limits, "MAX_TENSORS", 3)
    with refused(str(tmp_path), found="4 tensors"):
        Checkpoint.open(tmp_path)
