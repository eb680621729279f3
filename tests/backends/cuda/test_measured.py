"""Measurements of an architecture: the speeds by which the room chooses, and the evidence it then shows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from quantport.backend import Evidence, Request, WeightSpec
from quantport.kernels import tuned
from quantport.planning.select_kernel import select_kernel
from quantport.plugins.registry import Registry
from quantport_cuda import measured

HOST = Registry(only=["cuda"])
RUN = {
    "device": "NVIDIA H200",
    "date": "2026-12-01",
    "commit": "1a2b3c4",
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
}


def row(kernel, scheme, **speeds):
    return {kernel: {scheme: {"error": 0.0012, "speeds": {m.lstrip("m"): s for m, s in speeds.items()}}}}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes the measurements of sm_90 where the room looks for them."""
    (tmp_path / "tuned").mkdir()
    monkeypatch.setattr(tuned, "files", lambda package: tmp_path)

    def write(*rows):
        results = "benchmarks/results/nvidia-h200.json"
        data = {
            "results": results,
            "run": RUN,
            "shape": [4096, 4096],
            "kernels": {name: cell for row in rows for name, cell in row.items()},
        }
        (tmp_path / "tuned" / "sm_90.json").write_text(json.dumps(data))
        tuned.tuned_table.cache_clear()

    yield write
    tuned.tuned_table.cache_clear()


def ask(scheme, rows=1, n=4096, k=4096, device="cuda:sm_90"):
    device = HOST.device(device) if isinstance(device, str) else device
    return select_kernel(
        Request(WeightSpec(HOST.schemes[scheme], n, k), "linear", device, num_tokens=rows),
        HOST.kernels("cuda"),
    )


def test_the_nearest_number_of_rows_counts(table):
    table(row("cuda._scaled_mm", "fp8_per_channel", m1=0.8, m16=1.2, m512=1.7))
    assert [ask("fp8_per_channel", rows).speed for rows in (1, 3, 5, 16, 100, 4096)] == [
        0.8,
        0.8,
        1.2,
        1.2,
        1.7,
        1.7,
    ]
    assert "0.80x BF16 at 1 rows" in ask("fp8_per_channel").slow
    assert ask("fp8_per_channel", 512).slow == ""


def test_the_claim_names_the_results_and_the_run(table):
    table(row("cuda._scaled_mm", "fp8_per_channel", m1=1.1))
    claim = ask("fp8_per_channel").claim
    assert claim.evidence is Evidence.MEASURED
    assert claim.source == (
        "benchmarks/results/nvidia-h200.json (NVIDIA H200, 2026-12-01, commit 1a2b3c4, torch "
        "2.11.0+cu130, triton 3.6.0, "
        "relative error 1.2e-03)"
    )


def test_the_faster_kernel_wins_whatever_the_order(table):
    triton, pack = "cuda.triton_weight_only", "cuda._weight_int4pack_mm"
    table(row(triton, "int4_weight_only", m1=3.0, m64=1.0), row(pack, "int4_weight_only", m1=2.5, m64=1.4))
    assert [ask("int4_weight_only", rows).kernel for rows in (1, 64)] == [triton, pack]
    assert ask("int4_weight_only").claim.evidence is Evidence.MEASURED


def test_what_was_not_measured_stays_as_it_is(table):
    before = {scheme: ask(scheme) for scheme in ("fp8_per_tensor", "int8", "fp8_per_block")}
    table(row("cuda._scaled_mm", "fp8_per_channel", m1=1.1))
    assert {scheme: ask(scheme) for scheme in before} == before
    elsewhere = ask("fp8_per_channel", device="cuda:sm_89")
    assert (elsewhere.speed, elsewhere.claim.evidence) == (None, Evidence.DECLARED)


def test_the_speed_of_a_small_layer_is_not_known(table):
    table(row("cuda._scaled_mm", "fp8_per_channel", m1=1.1))
    found = ask("fp8_per_channel", n=512, k=1024)
    assert found.speed is None
    assert found.claim.evidence is Evidence.MEASURED


def test_without_triton_nothing_of_it_holds(table, monkeypatch):
    table(row("cuda._scaled_mm", "fp8_per_channel", m1=1.1))
    monkeypatch.setattr(measured, "available", lambda: "the package triton is not installed")
    here = replace(HOST.device("cuda:sm_90"), simulated=False, features=frozenset({"cuda>=12.9"}))
    found = ask("fp8_per_channel", device=here)
    assert (found.kernel, found.speed, found.claim.evidence) == ("cuda._scaled_mm", None, Evidence.DECLARED)
    assert ask("fp8_per_channel").speed == 1.1
