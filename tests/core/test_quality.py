"""Quality: the committed table is complete and says what the pages show; what it claims holds when a slice is
measured again.
"""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import quantport
from quantport.cli import compare
from quantport.scheme.catalog import BUILTIN

UNMEASURED = {"q4_1", "q5_0", "q5_1", "q2_k", "q3_k"}  # which GGUF files hold; plans say "not known" of them

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "examples" / "models"
DATA = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text(encoding="utf-8"))
ROWS = {r["name"]: r for r in DATA["rows"]}


@pytest.fixture(scope="module")
def bench():
    """The modules of the benchmark, which are scripts and no package."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("quality_model"), importlib.import_module("quality_page")
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize(("scheme", "bound"), [("int8", 1.01), ("int4_weight_only_g32", 1.06)])
def test_perplexity(scheme, bound):
    logging.disable_progress_bar()
    path = MODELS / "tiny-llama"
    ids = AutoTokenizer.from_pretrained(path)(
        (MODELS / "eval.txt").read_text(encoding="utf-8"), verbose=False
    ).input_ids
    windows = compare.cut(ids, 8, None)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    found = compare.quality(quantport.load(path, scheme), base, windows, lambda *_: None)
    assert found["perplexity_bf16"] < 120, "the model knows its text"
    assert found["perplexity"] <= bound * found["perplexity_bf16"]
    assert 0 < found["kl"] < 0.05


def test_every_scheme_has_a_complete_row():
    hadamard = {f"{s.name}:hadamard" for s in BUILTIN.values() if "hadamard" in s.options}
    options = {"nvfp4:mse", "nf4:double", "fp4:double", "mxfp4:mse", "mxfp8:floor"}
    assert {*BUILTIN, *hadamard, *options} - UNMEASURED <= set(ROWS)
    for row in DATA["rows"]:
        models = {"tiny-llama", "tiny-qwen3-moe"}
        assert set(row["models"]) == set(row["bits_in"]) == models
        assert set(row["sqnr"]) == {"gauss", "t5", "outlier", *models}
        assert all(
            set(m) == {"ppl", "dnll", "dnll_se", "kl", "kl_se", "top1"} for m in row["models"].values()
        )


def test_the_table_is_of_the_schemes_as_they_are():
    for name, scheme in BUILTIN.items():
        if name in UNMEASURED:
            continue
        assert ROWS[name]["bits"] == pytest.approx(8 * scheme.bytes(4096, 4096) / 4096**2, abs=1e-3)
        assert ROWS[name]["precision"] == scheme.precision


def test_every_check_of_the_committed_run_holds(bench):
    claims = bench[1].checks(DATA)
    assert len(claims) >= 20
    assert not [claim for claim in claims if not claim[2]]


def test_pages_are_those_of_the_committed_run(bench):
    page = bench[1]
    text = page.DOCS.read_text(encoding="utf-8")
    assert page.documented(text, DATA) == text, "stale: run benchmarks/quality.py --pages"
    assert page.results(DATA) == (page.RESULTS / "quality.md").read_text(encoding="utf-8")
    assert (page.RESULTS / "quality.svg").stat().st_size < 200_000


GAINS = [
    ("int4_mse", "int4_hqq", 0.3),
    ("nvfp4:mse", "nvfp4", 1.0),
    ("nvfp4:mse", "mxfp4", 1.0),
    ("mxfp4:mse", "mxfp4", 0.02),
    ("mxfp4", "mxfp4:floor", 0.0),
    ("mxfp4_dualscale", "mxfp4", 0.2),
    ("mxfp8", "mxfp6_e2m3", 0.0),
]


@pytest.mark.parametrize(("better", "worse", "least"), GAINS)
def test_gains_on_a_slice(bench, better, worse, least):
    """Fresh weights, the same relations; and the committed figure of the same distribution, within
    sampling.
    """
    weight = (torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()

    def db(name):
        noise = (bench[0].values(weight, BUILTIN[name]) - weight.float()).square().sum()
        return float(10 * torch.log10(weight.float().square().sum() / noise))

    assert db(better) - db(worse) >= least
    assert db(better) == pytest.approx(ROWS[better]["sqnr"]["gauss"], abs=0.15)


@pytest.mark.parametrize(
    ("model", "scheme"),
    [("tiny-llama", "mxfp4_w4a8"), ("tiny-qwen3-moe", "nvfp4"), ("tiny-llama", "mxfp4:hadamard")],
)
def test_the_benchmark_runs_the_reference(bench, model, scheme):
    """Weights dequantized once give the logits of a model loaded with the exact emulation, bit for bit."""
    logging.disable_progress_bar()
    path, chosen = MODELS / model, BUILTIN[scheme]
    loaded = quantport.load(path, scheme, fallback="reference", dtype=torch.float32)
    assert {s.choice.kernel for s in loaded.quantport_plan.quantized} == {"torch.reference"}
    plain = quantport.load(path, "bf16", dtype=torch.float32)
    modules = [(p, m) for p, m in plain.named_modules() if isinstance(m, quantport.modules.QuantModule)]
    weights = {
        (p, n): bench[0].values(m.stored_weight(n)["weight"], chosen) for p, m in modules for n in m.specs
    }
    bench[0].install(plain, weights, dataclasses.replace(chosen))
    ids = torch.arange(100, 148)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, loaded(ids).logits)
