"""Every scheme end to end on both example models: ``run --compare``, then save and reload, bit for bit."""

from __future__ import annotations

import json

import pytest
from core_models import DENSE, MOE, same_state
from test_cli import ask

import quantport
from quantport.scheme.catalog import BUILTIN

SCHEMES = [s.name for s in BUILTIN.values() if s.weight.format != "bf16"] + [
    "nvfp4:mse",
    "nf4:double",
    "mxfp4:floor",
    "mxfp4:hadamard",
    "q4_k:a8",
    "q8_0:a8",
]


QUICK = ("--tokens", "4", "--windows", "1", "--json")
WORST = {2: 1.2, 8: 1.05}  # largest ratio of perplexities, by the bits of weights from which on it holds


# Those that experts are quantized to here; in the nightly target, all.
EXPERTS = ("int8", "fp8_per_block", "int4_weight_only", "int4_mse", "mxfp4", "nvfp4", "nf4", "q4_k")
ASKED = [(scheme, DENSE) for scheme in SCHEMES] + [
    pytest.param(scheme, MOE, marks=[] if scheme in EXPERTS else pytest.mark.slow) for scheme in SCHEMES
]


@pytest.mark.parametrize(("scheme", "model"), ASKED, ids=lambda value: getattr(value, "name", value))
def test_run_compare_save_and_reload(scheme, model, tmp_path):
    data = json.loads(ask("run", model, "--scheme", scheme, "--compare", *QUICK).stdout)["compare"]
    bits = BUILTIN[scheme].weight.element.bits
    assert 0.95 < data["perplexity"] / data["perplexity_bf16"] < WORST[max(b for b in WORST if b <= bits)]
    assert data["bytes"] < data["bytes_bf16"]
    first = quantport.load(model, scheme)
    again = quantport.load(quantport.save(first, tmp_path / "saved"))
    same_state(first, again)


@pytest.mark.parametrize("model", [DENSE, MOE], ids=lambda path: path.name)
def test_mxfp4_with_an_fp8_cache(model):
    data = json.loads(
        ask("run", model, "--scheme", "mxfp4", "--kv-cache", "fp8", "--compare", *QUICK).stdout
    )["compare"]
    assert 0.95 < data["perplexity"] / data["perplexity_bf16"] < WORST[2]
