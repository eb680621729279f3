"""The user's own measurements: written by ``bench --save``, preferred by the plan, ignored where they do not
hold.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from core_fakes import arch
from test_cli import ask, parts

import quantport
from quantport.backend import Device, Evidence, Request, WeightSpec, find_tuned
from quantport.cli import bench_linear
from quantport.errors import SaveError
from quantport.kernels import own_speeds, tuned
from quantport.plugins.registry import default_registry

HERE = Device(arch(), name="Chip")
SHIPPED = {
    "run": {"device": "Lab", "date": "2026-01-01", "commit": "1a2b3c4"},
    "shape": [64, 64],
    "kernels": {"k": {name: {"error": 0.001, "speeds": {"1": 1.5}} for name in ("int8", "fp8_per_channel")}},
}


def table(speed=3.0, scheme="int8", **run):
    about = {"device": "Chip", "date": "2026-02-02", "version": "0.1.0", "threads": torch.get_num_threads()}
    row = {"error": 0.002, "speeds": {"1": speed}}
    return {"run": about | run, "shape": [64, 64], "kernels": {"k": {scheme: row}}}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTPORT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuned, "tuned_table", lambda package, name: SHIPPED)
    own_speeds._read.cache_clear()
    yield
    own_speeds._read.cache_clear()


def found(scheme="int8", device=HERE):
    request = Request(WeightSpec(default_registry().schemes[scheme], 64, 64), "linear", device)
    one = find_tuned("toy", "k", request)
    return one.speed(request), one.claim("page.md")


def test_own_speeds_come_first_and_the_evidence_names_the_file():
    path = own_speeds.save_own(HERE, table())
    speed, claim = found()
    assert (speed, claim.evidence, claim.proof.file) == (3.0, Evidence.MEASURED, str(path))
    assert claim.source == f"{path} (Chip, 2026-02-02, quantport 0.1.0, relative error 2.0e-03)"
    assert found("fp8_per_channel")[0] == 1.5


@pytest.mark.parametrize(
    ("run", "device"),
    [
        ({"device": "Other"}, HERE),
        ({"threads": torch.get_num_threads() + 1}, HERE),
        ({}, replace(HERE, simulated=True)),
    ],
    ids=["device", "threads", "simulated"],
)
def test_what_was_measured_otherwise_does_not_count(run, device):
    own_speeds.save_own(HERE, table(**run))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        speed, claim = found(device=device)
    assert speed == 1.5
    assert claim.source.startswith("page.md (Lab")


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"run": {"dev',
        "[]",
        '{"a": 1}',
        json.dumps({**table(), "kernels": {"k": {"int8": {"error": 0.1, "speeds": {"1": None}}}}}),
        json.dumps({**table(), "kernels": {"k": {"int8": {"error": 0.1, "speeds": {"0": 1.0}}}}}),
        json.dumps({**table(), "kernels": {"k": {"int8": {"error": 0.1, "speeds": {"1": -1.0}}}}}),
        json.dumps({**table(), "shape": 64}),
        json.dumps(SHIPPED),
    ],
    ids=["empty", "torn", "list", "foreign", "null", "tokens", "negative", "shape", "of-a-package"],
)
def test_a_damaged_file_is_ignored_with_one_warning_and_replaced(text):
    path = own_speeds.own_path(HERE)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match="own measurements ignored") as said:
        assert [found()[0], found()[0]] == [1.5, 1.5]
    assert [str(path) in str(one.message) for one in said] == [True]
    with pytest.warns(UserWarning, match="ignored"):
        own_speeds.save_own(HERE, table())
    assert found()[0] == 3.0


def test_more_schemes_are_added_and_another_way_starts_again():
    own_speeds.save_own(HERE, table())
    own_speeds.save_own(HERE, table(2.0, "fp8_per_channel", date="2026-03-03"))
    assert (found()[0], found("fp8_per_channel")[0]) == (3.0, 2.0)
    own_speeds.save_own(HERE, table(4.0, "fp8_per_channel", version="0.2.0"))
    assert (found()[0], found("fp8_per_channel")[0]) == (1.5, 4.0)
    assert [p.name for p in own_speeds.own_path(HERE).parent.iterdir()] == ["acme-a1.json"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANTPORT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(SaveError, match="QUANTPORT_CACHE_DIR"):
        own_speeds.save_own(HERE, table())


def test_bench_saves_what_the_plan_says(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_linear, "Effort", lambda: bench_linear.QUICK)
    asked = ("bench", "--scheme", "int8", "--scheme", "bf16", "--num-tokens", "1", "--size", "64", "96")
    data = json.loads(ask(*asked, "--device", "cpu", "--save", "--json").stdout)
    assert data["saved"].startswith(str(tmp_path))
    row = data["results"][0]
    device = default_registry().device("cpu")
    request = Request(WeightSpec(quantport.schemes["int8"], 64, 96), "linear", device)
    kernel = default_registry().kernel(row["kernel"])
    expected = round(min(row["vs_bf16"], row["vs_prepacked"] or row["vs_bf16"]), 3)
    assert kernel.speed(request) == expected
    assert kernel.claim(request).source.startswith(data["saved"])
    assert 0 <= row["error"] <= kernel.tolerance


def test_quick_is_not_saved():
    assert "--quick measures nothing" in str(parts(ask("bench", "--quick", "--save", code=2)))
