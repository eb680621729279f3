"""Measured speeds of a room: of which kernel and scheme, at which number of tokens, and their claim."""

from __future__ import annotations

import json

import pytest

from quantport.backend import Arch, Device, Evidence, Measurement, Request, WeightSpec, find_tuned
from quantport.kernels import tuned
from quantport.plugins.registry import default_registry

RUN = {"device": "Chip", "date": "2026-01-02", "commit": "1a2b3c4"}
ROW = {"error": 0.0012, "speeds": {"1": 0.5, "16": 2.0, "512": 3.0}}
TABLE = {"run": RUN, "shape": [4096, 4096], "kernels": {"toy.int8": {"int8": ROW}, "toy.fp8": {"fp8": ROW}}}


@pytest.fixture(autouse=True)
def _table(tmp_path, monkeypatch):
    """The file of one architecture."""
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "v2.json").write_text(json.dumps(TABLE), encoding="utf-8")
    monkeypatch.setattr(tuned, "files", lambda package: tmp_path)
    tuned.tuned_table.cache_clear()
    yield
    tuned.tuned_table.cache_clear()


def request_of(num_tokens=1, n=4096, k=4096, arch="v2", scheme="int8"):
    device = Device(Arch("toy", arch, "Toy", frozenset(), "a manual", family="Toy"))
    spec = WeightSpec(default_registry().schemes[scheme], n, k)
    return Request(spec, "linear", device, num_tokens=num_tokens)


def test_the_nearest_number_of_tokens_on_a_log_scale():
    speeds = [find_tuned("toy", "toy.int8", r).speed(r) for r in map(request_of, (1, 3, 5, 16, 100, 4096))]
    assert speeds == [0.5, 0.5, 2.0, 2.0, 3.0, 3.0]


def test_a_small_layer_has_evidence_and_no_speed():
    just, below = request_of(n=1024, k=1024), request_of(n=1024, k=1023)
    assert find_tuned("toy", "toy.int8", just).speed(just) == 0.5
    assert find_tuned("toy", "toy.int8", below).speed(below) is None
    assert find_tuned("toy", "toy.int8", below).claim("page.md").evidence is Evidence.MEASURED


@pytest.mark.parametrize(
    ("kernel", "about"),
    [("toy.other", {}), ("toy.int8", {"arch": "v1"}), ("toy.int8", {"scheme": "int4_weight_only"})],
    ids=["kernel", "architecture", "scheme"],
)
def test_nothing_is_known_of_another(kernel, about):
    assert find_tuned("toy", kernel, request_of(**about)) is None


def test_the_claim_names_the_page_and_the_run():
    claim = find_tuned("toy", "toy.int8", request_of()).claim("page.md", ", with a compiler")
    assert (
        claim.source == "page.md (Chip, 2026-01-02, commit 1a2b3c4, with a compiler, relative error 1.2e-03)"
    )
    assert claim.proof == Measurement("toy/tuned/v2.json", **RUN)
