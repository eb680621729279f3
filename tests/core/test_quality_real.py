"""Quality on a real model: the committed run is complete and is what pages and package say; plans print it,
and nobody is given a scheme that costs too much without having asked for it.
"""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
from core_fakes import FakeKernel, Shape, device

from quantport.cli.plans import plan_page
from quantport.config import QuantConfig
from quantport.kernels.verdict import Status
from quantport.model.layers import find_layers
from quantport.planning import select_kernel
from quantport.planning.plan import make_plan
from quantport.planning.select_kernel import best_scheme
from quantport.scheme import Solver
from quantport.scheme.catalog import BUILTIN
from quantport.scheme.quality import NEAR_LOSSLESS, NOTICEABLE, Quality, QualityClass, measured_quality

UNMEASURED = {"q4_1", "q5_0", "q5_1", "q2_k", "q3_k"}  # which GGUF files hold; plans say "not known" of them
ROOT = Path(__file__).parents[2]
DATA = json.loads((ROOT / "benchmarks" / "results" / "quality_real.json").read_text(encoding="utf-8"))
ROWS = {row["name"]: row for row in DATA["rows"]}
MEASURED = {name: row["models"][DATA["model"]] for name, row in ROWS.items()}


@pytest.fixture(scope="module")
def page():
    """The benchmark, which is a script and no package."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("quality_real")
    finally:
        sys.path.remove(folder)


def test_every_scheme_and_option_was_measured():
    hadamard = {f"{s.name}:hadamard" for s in BUILTIN.values() if "hadamard" in s.options}
    options = {"nvfp4:mse", "nf4:double", "fp4:double", "mxfp4:mse"}
    assert {*BUILTIN, *hadamard, *options} - UNMEASURED <= set(ROWS)
    assert all(m["kl"] >= 0 and m["kl_se"] >= 0 for m in MEASURED.values())
    for name, row in ROWS.items():
        scheme = BUILTIN[name.removesuffix(":16")]
        assert row["bits"] == pytest.approx(8 * scheme.bytes(4096, 4096) / 4096**2, abs=1e-3)


def test_what_is_written_is_what_was_measured(page):
    assert page.packaged(DATA) == page.PACKAGED.read_text(encoding="utf-8")
    assert page.results(DATA) == (page.RESULTS / "quality_real.md").read_text(encoding="utf-8")
    text = page.DOCS.read_text(encoding="utf-8")
    assert page.documented(text, DATA) == text, "stale: run benchmarks/quality_real.py --pages"


@pytest.mark.parametrize("name", sorted(MEASURED))
def test_look_up(name, page):
    if name in page.FLATTERED:
        assert measured_quality(BUILTIN[name]) is None, "the model was made of this scheme's numbers"
        return
    scheme = BUILTIN[name.removesuffix(":16")]
    scheme = scheme.weight_only if name.endswith(":16") else scheme
    assert measured_quality(scheme).kl == pytest.approx(MEASURED[name]["kl"], rel=5e-3)


def test_what_a_device_falls_back_to_was_measured():
    for scheme in BUILTIN.values():
        assert measured_quality(scheme.weight_only) or scheme.name in UNMEASURED | {"q4_k"}, scheme.name


class Mine(Solver):
    name = "mine"

    def solve(self, weight, scheme, stats=None):
        raise AssertionError("a look-up solves nothing")


def test_look_up_goes_by_numbers():
    """A fallback to 16-bit activations costs what the weights cost; another name changes nothing."""
    assert measured_quality(BUILTIN["int8"].weight_only) == measured_quality(BUILTIN["int8_weight_only"])
    assert measured_quality(BUILTIN["nvfp4"].weight_only) == measured_quality(BUILTIN["nvfp4_weight_only"])
    assert measured_quality(dataclasses.replace(BUILTIN["int8"], name="mine")) == measured_quality(
        BUILTIN["int8"]
    )
    assert measured_quality(BUILTIN["int8"].solved_by(Mine())) is None
    coarse = dataclasses.replace(BUILTIN["int8"].weight, block_shape=(1, 96))
    assert measured_quality(dataclasses.replace(BUILTIN["int8"], weight=coarse)) is None


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.0, QualityClass.NEAR_LOSSLESS),
        (NEAR_LOSSLESS, QualityClass.NEAR_LOSSLESS),
        (NEAR_LOSSLESS * 1.01, QualityClass.NOTICEABLE),
        (NOTICEABLE, QualityClass.NOTICEABLE),
        (NOTICEABLE * 1.01, QualityClass.SEVERE),
    ],
)
def test_classes(kl, expected):
    quality = Quality(kl, 0.0, 0.01, "m")
    assert quality.quality_class is expected
    assert quality.to_dict()["class"] == str(expected)
    assert str(expected) in str(quality)


INT8 = FakeKernel("k.int8", accepts=lambda r: r.weight.scheme.name == "int8", quantizes=True, speed=2.5)
FP8 = FakeKernel(
    "k.fp8", accepts=lambda r: r.weight.scheme.name == "fp8_per_channel", quantizes=True, speed=9.0
)
DEQUANTIZE = FakeKernel("acme.dequantize", Status.DEQUANTIZE)


def test_the_device_chooses_only_what_is_near_lossless(monkeypatch):
    assert best_scheme(device(), (INT8, FP8, DEQUANTIZE), BUILTIN)[0] == "fp8_per_channel"
    real = measured_quality

    def worse(scheme):
        found = real(scheme)
        return dataclasses.replace(found, kl=0.4) if scheme.name == "fp8_per_channel" else found

    monkeypatch.setattr(select_kernel, "measured_quality", worse)
    name, why = best_scheme(device(), (INT8, FP8, DEQUANTIZE), BUILTIN)
    assert name == "int8"
    assert "the fastest of 1 near-lossless schemes" in why
    monkeypatch.setattr(select_kernel, "measured_quality", lambda scheme: None)
    name, why = best_scheme(device(), (INT8, FP8, DEQUANTIZE), BUILTIN)
    assert (name, "quality: not known" in why) == ("int8_weight_only", True)


@pytest.mark.parametrize(
    ("scheme", "kernels", "runs_as"),
    [
        ("int8", (INT8, DEQUANTIZE), "int8"),
        ("int8", (FakeKernel("w", Status.WEIGHT_ONLY),), "int8_weight_only"),
        ("nvfp4", (FakeKernel("w", Status.WEIGHT_ONLY),), "nvfp4_weight_only"),
    ],
)
def test_a_plan_says_what_runs_costs(scheme, kernels, runs_as):
    layers = find_layers({"a.weight": Shape((4096, 4096))})
    plan = make_plan(layers, QuantConfig.parse(scheme, BUILTIN), device(), kernels, BUILTIN)
    expected = measured_quality(BUILTIN[runs_as])
    assert plan.steps[0].choice.quality == expected
    assert plan.to_dict()["layers"][0]["quality"] == expected.to_dict()
    page = plan_page(plan)
    assert page.data["quality"] == [f"{scheme} as {plan.steps[0].choice.precision}: {expected}"]
    assert any("quality: " in getattr(block, "text", "") for block in page.blocks)
