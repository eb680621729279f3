"""The GPU benchmark: its page says what its JSON says, and its code runs without a GPU as far as that is
possible.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import types
from importlib.metadata import entry_points

import house_source as house
import pytest

from quantport.kernels import tuned
from quantport.kernels.base import Request, WeightSpec
from quantport.planning.select_kernel import select_kernel
from quantport.plugins.registry import Registry

BENCHMARKS = house.ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
FOUR = (4096, 4096)


@pytest.fixture(scope="module")
def bench():
    """Imports a module of the benchmark, which are scripts and no package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(BENCHMARKS))


def timed(name, m, seconds, shape=FOUR, kind="ours", **more):
    row = {
        "name": name,
        "shape": list(shape),
        "m": m,
        "seconds": seconds,
        "kind": kind,
        "scheme": name,
        "kernel": f"k.{name}",
    }
    return {**row, "limit": seconds / 2, "as_requested": True, **more}


def checked(kernel, error, **more):
    row = {
        "kernel": kernel,
        "scheme": "int8",
        "cases": 4,
        "error": error,
        "tolerance": 7.8e-3,
        "failures": [],
        "skipped": 0,
    }
    return {**row, **more}


def data(*rows, **stages):
    base = [timed("BF16 F.linear", m, 1e-3, kind="baseline", scheme="bf16") for m in (1, 64, 512)]
    return {
        "kind": "gpu",
        "run": {"device": "Some GPU", "arch": "sm_90"},
        "linear": {"rows": [*base, *rows]},
        **stages,
    }


def everywhere(targets, name, seconds, base=1e-3):
    """Rows of a scheme at every shape and number of rows."""
    both = (("BF16 F.linear", base, "baseline", "bf16"), (name, seconds, "ours", name))
    return {
        "linear": {
            "rows": [
                timed(n, m, s, shape, kind, scheme=of)
                for n, s, kind, of in both
                for shape in targets.SHAPES
                for m in targets.ROWS
            ]
        }
    }


def target(targets, run, what):
    (one,) = [t for t in targets.targets(run) if what in t.what]
    return one


def test_without_a_run_every_number_is_not_measured(bench):
    page, plot = bench("gpu_page").render({})
    targets = bench("gpu_targets").targets({})
    assert len(targets) == 15
    assert all(t.state == "not measured" and t.measured is None for t in targets)
    lines = [line for line in page.splitlines() if line.startswith("|") and ">=" in line]
    assert len(lines) == 14
    assert all("| not measured | >= " in line for line in lines)
    assert "not measured" in plot


def test_the_committed_pages_are_those_of_the_committed_runs(bench):
    page = bench("gpu_page")
    assert (RESULTS / "gpu.md").read_text(encoding="utf-8") == page.index(RESULTS), (
        "stale: run benchmarks/gpu.py --render on each JSON"
    )
    for name, run in page.runs(RESULTS).items():
        assert "smoke" not in run["run"]["device"]
        text, plot = page.render(run)
        assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") == text
        assert (RESULTS / f"{name}.svg").read_text(encoding="utf-8") == plot


def test_the_page_says_the_numbers_of_the_json(bench):
    peer = timed("torchao int8", 512, 0.25e-3, kind="peer", scheme="int8")
    decode = [
        {"name": "bf16", "ms": 4.0, "speed": 1.0, "kernel": "F.linear"},
        {"name": "nf4", "missing": "out of time"},
    ]
    run = data(
        timed("int8", 512, 0.5e-3),
        timed("fp8_per_tensor", 1, 0.8e-3),
        peer,
        limits={"copy": 4.321e12, "bf16": 7.89e14, "absent": {"host": "LookupError: none"}},
        checks={
            "rows": [checked("k.a", 1.5e-3), checked("k.b", 0.5, failures=["M=2: 5.0e-01"], skipped=3)],
            "missing": "2 of 12 processes died",
        },
        decode={"rows": decode},
        quantize={"missing": "RuntimeError: no"},
    )
    page, plot = bench("gpu_page").render(run)
    assert "| int8 | not measured | not measured | not measured | 2.00x (50%) | not measured |" in page
    assert "| fp8_per_tensor | 1.25x (50%) |" in page
    assert "| torchao int8 | not measured | not measured | not measured | 4.00x (50%) |" in page
    assert "| 4321.0 GB/s |" in page
    assert "| 789.0 TFLOP/s |" in page
    assert "| not measured: LookupError: none |" in page
    assert "not measured: RuntimeError: no" in page
    assert "| k.a | int8 | 4 | 1.5e-03 | 7.8e-03 | ok |" in page
    assert (
        "| k.b | int8 | 4 | 5.0e-01 | 7.8e-03 | M=2: 5.0e-01; 3 cases not measured: no time or no memory |"
        in page
    )
    assert "The rest: not measured: 2 of 12 processes died" in page
    assert "| nf4 | not measured | not measured | not measured | not measured: out of time |" in page
    assert "2.00x</text>" in plot


def test_a_target_is_met_only_when_every_case_was_measured(bench):
    targets = bench("gpu_targets")
    met = target(targets, everywhere(targets, "int8", 0.5e-3), "int8, over")
    assert (met.state, met.measured, met.need) == ("met", pytest.approx(2.0), 1.5)
    assert met.beside["limit"] == pytest.approx(4.0)
    partly = target(targets, data(timed("int8", 512, 0.5e-3)), "int8, over")
    assert (partly.state, partly.measured) == ("not measured", pytest.approx(2.0))
    assert "1 of 16 cases" in partly.where


def test_one_case_below_it_misses_a_target(bench):
    targets = bench("gpu_targets")
    run = everywhere(targets, "int8", 0.5e-3)
    slow = next(
        r
        for r in run["linear"]["rows"]
        if r["scheme"] == "int8" and r["m"] == 4096 and r["shape"] == [8192, 8192]
    )
    slow["seconds"] = 0.9e-3
    missed = target(targets, run, "int8, over")
    assert missed.state == "missed"
    assert missed.measured == pytest.approx(1 / 0.9)
    assert "8192x8192, M=4096" in missed.where
    assert target(targets, data(timed("int8", 512, 0.9e-3)), "int8, over").state == "missed"


def test_a_kernel_of_another_precision_than_asked_does_not_count(bench):
    targets = bench("gpu_targets")
    rows = [timed("int8", 512, 0.1e-3, as_requested=False), timed("int8", 512, 0.5e-3, kernel="k.asked")]
    assert target(targets, data(*rows), "int8, over").measured == pytest.approx(2.0)
    assert target(targets, data(rows[0]), "int8, over").state == "not measured"


def test_peers_and_shares_are_of_the_same_case(bench):
    targets = bench("gpu_targets")
    peer = timed("gemlite int4_weight_only", 1, 0.4e-3, kind="peer", scheme="int4_weight_only")
    bare = timed("bare _scaled_mm, row scales", 512, 0.45e-3, kind="bare", scheme="fp8_row")
    run = data(
        timed("int4_weight_only", 1, 0.25e-3, limit=0.2e-3), peer, bare, timed("fp8_per_tensor", 512, 0.5e-3)
    )
    assert target(targets, run, "int4_weight_only, over BF16 at M = 1").beside == pytest.approx(
        {"gemlite": 2.5, "limit": 5.0}
    )
    assert target(targets, run, "of the bandwidth bound").measured == pytest.approx(80)
    assert target(targets, run, "over bare").measured == pytest.approx(0.9)


def test_stages_of_one_number_are_judged(bench):
    targets = bench("gpu_targets")
    loads = [
        {"name": n, "speed": s, "peak_ratio": p}
        for n, s, p in zip(targets.LOADED, (0.9, 0.84, 1.0), (0.9, 1.0, 0.99), strict=True)
    ]
    run = {
        "load": {"rows": loads},
        "quantize": {"rows": [{"scheme": "a", "share": 0.9}, {"scheme": "b", "missing": "no"}]},
        "decode": {"rows": [{"name": "fp8_per_channel", "speed": 1.5}]},
    }
    assert target(targets, run, "loading a checkpoint").state == "missed"
    assert target(targets, run, "peak device memory").state == "met"
    assert target(targets, run, "quantizing a weight").state == "not measured"
    assert target(targets, run, "in fp8").state == "met"
    assert target(targets, run, "in int4").state == "not measured"
    page, _ = bench("gpu_page").render(run)
    assert "| a |  | not measured | 90% | >= 70% | met |" in page
    assert "| b |  | not measured | not measured | >= 70% | not measured: no |" in page


def test_evidence_is_of_kernels_that_were_right_and_the_room_reads_it(bench, tmp_path, monkeypatch):
    checks = {"rows": [checked("k.good", 2e-3), checked("k.bad", 1e-3, failures=["M=2: 5.0e-01"])]}
    rows = [
        timed("int8", 1, 0.5e-3, kernel="k.good"),
        timed("int8", 512, 0.25e-3, kernel="k.good"),
        timed("int8", 1, 0.1e-3, kernel="k.bad"),
    ]
    run = data(*rows, timed("nf4", 1, 1e-4, kernel="k.unchecked"), checks=checks)
    run["run"] |= dict.fromkeys(("date", "commit", "torch", "triton"), "x")
    evidence = bench("gpu_evidence").evidence(run, "benchmarks/results/some-gpu.json")
    assert evidence == {
        "results": "benchmarks/results/some-gpu.json",
        "run": {"device": "Some GPU", "date": "x", "commit": "x", "torch": "x", "triton": "x"},
        "shape": [4096, 4096],
        "kernels": {"k.good": {"int8": {"error": 2e-3, "speeds": {"1": 2.0, "512": 4.0}}}},
    }
    evidence["kernels"]["cuda.triton_int8"] = evidence["kernels"].pop("k.good")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "sm_90.json").write_text(json.dumps(evidence))
    monkeypatch.setattr(tuned, "files", lambda package: tmp_path)
    tuned.tuned_table.cache_clear()
    host = Registry(only=["cuda"])
    request = Request(
        WeightSpec(host.schemes["int8"], 4096, 4096), "linear", host.device("cuda:sm_90"), num_tokens=512
    )
    choice = select_kernel(request, host.kernels("cuda"))
    tuned.tuned_table.cache_clear()
    assert (choice.kernel, choice.speed, str(choice.claim.evidence)) == ("cuda.triton_int8", 4.0, "measured")


def test_cases_are_summed_up(bench):
    def case(kernel, ok, error, **more):
        return {
            "kernel": kernel,
            "scheme": "int8",
            "case": "M=2",
            "tolerance": 7.8e-3,
            "error": error,
            "ok": ok,
            **more,
        }

    rows = [
        case("k.a", True, 1e-3),
        case("k.a", True, 2e-3),
        case("k.b", False, 0.5),
        {"kernel": "k.a", "scheme": "int8", "skipped": "no"},
    ]
    summary = bench("gpu_checks").summary(rows)
    assert summary["rows"] == [
        checked("k.a", 2e-3, cases=2, skipped=1),
        checked("k.b", 0.5, cases=1, failures=["M=2: 5.0e-01"]),
    ]
    assert summary["failed"] == 1
    broken = {"kernel": "k.c", "scheme": "int8", "case": "M=1", "ok": False, "failure": "RuntimeError: x"}
    assert bench("gpu_checks").summary([broken])["rows"][0]["failures"] == ["M=1: RuntimeError: x"]


def test_candidates_are_neighbours(bench):
    entry = {"max_rows": 16, "kernel": "gemm", "BM": 16, "warps": 4, "stages": 1}
    made = bench("gpu_tune").candidates(entry)
    assert made[0] == entry
    assert {**entry, "BM": 32} in made
    assert {**entry, "BM": 8, "warps": 8} in made
    assert all(
        1 <= c["warps"] <= 16 and 1 <= c["stages"] <= 6 and c["max_rows"] == 16 and c["kernel"] == "gemm"
        for c in made
    )
    assert len({json.dumps(c) for c in made}) == len(made)


def test_it_needs_no_installation(bench, monkeypatch):
    place = bench("gpu_place")
    monkeypatch.setattr(place, "find_spec", lambda name: None)
    monkeypatch.setattr(place, "entry_points", lambda group: [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.path)
    place.find_quantport()
    added = [p for p in sys.path if p not in before]
    assert set(added) <= set(sys.path)
    assert {p.value for p in entry_points(group="quantport.backends", name="cuda")} == {"quantport_cuda"}
    assert any(p.endswith("core") for p in sys.path)


def smoke(tmp_path, *arguments):
    env = {**os.environ, "TRITON_INTERPRET": "1", "QUANTPORT_BENCH_RAISE": "1"}
    out = tmp_path / "smoke.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--smoke", "--out", str(out), *arguments]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(out.read_text(encoding="utf-8")) if out.exists() else ended.stdout


def test_smoke_of_the_stages_that_check(tmp_path):
    run = smoke(tmp_path, "--only", "checks", "bits")
    assert not [name for name in ("checks", "bits") if run[name].get("missing")]
    assert run["checks"]["failed"] == run["bits"]["failed"] == 0
    assert {"int4_weight_only", "fp8_per_channel"} <= {
        r["scheme"] for r in run["checks"]["rows"] if "triton" in r["kernel"]
    }
    assert run["linear"] == {"missing": "not asked for"}
    assert (tmp_path / "smoke.md").exists()


def test_a_stage_that_does_not_end_is_ended_and_says_so(bench, tmp_path, monkeypatch):
    gpu = bench("gpu")
    monkeypatch.setattr(gpu, "GRACE", 0.1)
    # less than importing torch takes
    result = gpu.stage("models", argparse.Namespace(smoke=True), {}, 0.1, tmp_path)
    assert result["missing"] == "it did not end within 0 s"
    assert result["seconds"] < 5


def test_a_stage_that_fails_keeps_what_it_had_and_says_why(bench, tmp_path, monkeypatch):
    gpu, module = bench("gpu"), types.SimpleNamespace()

    def run(place, previous, keep):
        keep({"rows": [1]})
        raise ZeroDivisionError("by nought")

    module.run = run
    monkeypatch.setitem(sys.modules, "gpu_limits", module)
    # it mends the interpreter of this process, which is mended
    monkeypatch.setattr(gpu, "begin", lambda smoke: None)
    monkeypatch.delenv("QUANTPORT_BENCH_RAISE", raising=False)
    out = tmp_path / "out.json"
    gpu.run_stage(
        argparse.Namespace(smoke=True, until=0.0, stage="limits", previous=tmp_path / "none.json", out=out)
    )
    assert json.loads(out.read_text(encoding="utf-8")) == {
        "rows": [1],
        "missing": "ZeroDivisionError: by nought",
    }


@pytest.mark.parametrize(
    ("arguments", "interpreted", "said"),
    [
        (["--only", "limits"], "0", "no GPU found"),
        ([], "1", "go together"),
        (["--smoke"], "0", "go together"),
    ],
)
def test_without_a_gpu_it_says_what_works(tmp_path, arguments, interpreted, said):
    env = {**os.environ, "TRITON_INTERPRET": interpreted, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path / "x.json"), *arguments]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert said in ended.stderr
    assert "--smoke" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_no_stage_begins_without_time(tmp_path):
    run = smoke(tmp_path, "--total", "0.5")
    assert all(run[name] == {"missing": "out of time"} for name in ("limits", "checks", "linear", "decode"))
    assert "not measured: out of time" in (tmp_path / "smoke.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_smoke_of_everything(tmp_path):
    run = smoke(tmp_path)
    stages = ("limits", "checks", "bits", "models", "linear", "quantize", "load", "decode")
    assert not [(name, run[name]["missing"]) for name in stages if run[name].get("missing")]
    assert run["models"]["failed"] == 0
    assert {r["missing"] for r in run["models"]["rows"] if "missing" in r} == {"needs a GPU"}
    assert {r["kind"] for r in run["linear"]["rows"]} >= {"baseline", "ours", "bare"}
    assert all(r["speed"] > 0 for r in (*run["load"]["rows"], *run["decode"]["rows"]))
    assert all(r["read_GBps"] > 0 for r in run["quantize"]["rows"])


@pytest.mark.slow
def test_smoke_of_tuning(tmp_path):
    tuned = smoke(tmp_path, "--tune", "60")
    assert all(set(entry) >= {"max_rows", "kernel"} for entry in tuned["weight_only"])
