"""The evidence of cross-compilation is up to date, follows from what was compiled, and is what the verdicts
say.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import quantport_triton
from quantport.backend import Evidence, Request, WeightSpec
from quantport.plugins.registry import Registry
from quantport_cuda.capabilities import ARCHS
from quantport_triton import evidence
from quantport_triton import quantize as launching
from quantport_triton.kernels import base
from quantport_triton.kernels.weight_only import TritonWeightOnly
from quantport_triton.launch import traced
from quantport_triton.quantize import quantize
from quantport_triton.weights import quantize_weight

ROOT = Path(__file__).parents[3]
HOST = Registry(only=["cuda"])
TARGETS = evidence.read("cuda")["targets"]
OPTIONS = ("nf4:double", "fp4:double", "int4_weight_only:g128:fp16", "int4_weight_only:g128:fp32:asym")
SCHEMES = [*HOST.schemes.values(), *(HOST.schemes[name] for name in OPTIONS)]
NOT_COMPILED = {"outcome": "nobody compiled it", "kernels": {}}
OUTCOMES = {"native", "up-cast", "no matrix instruction", "refused", "not compiled"}
# The compiler's own words change with its version: with another one the file is not stale, it is about
# something else.
pinned = pytest.mark.skipif(
    (triton := pytest.importorskip("triton")).__version__ != evidence.read("cuda")["triton"],
    reason=f"the evidence is of Triton {evidence.read('cuda')['triton']}, and {triton.__version__} is "
    "installed",
)


def check(*arguments: str) -> tuple[int, str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "benchmarks" / "compile.py", "--check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.returncode, done.stdout + done.stderr[-2000:]


@pinned
@pytest.mark.parametrize(
    "target",
    [pytest.param(t, marks=[] if t in ("sm_80", "sm_90", "sm_100") else pytest.mark.slow) for t in ARCHS],
)
def test_what_is_launched_is_what_was_compiled(target):
    code, told = check("--filed", "--target", target)
    assert code == 0, f"{told}\nrun `python benchmarks/compile.py` and commit what it writes"


@pinned
@pytest.mark.parametrize(
    ("target", "family"),
    [
        ("sm_100", "nvfp4"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                ("sm_75", "weight_only"),
                ("sm_80", "int8"),
                ("sm_86", "int4_int8"),
                ("sm_89", "fp8_block"),
                ("sm_90", "fp8"),
                ("sm_103", "quantize"),
                ("sm_120", "mx"),
                ("sm_121", "nvfp4"),
            )
        ),
    ],
)
def test_a_sample_compiles_to_what_is_on_file(target, family):
    code, told = check("--all", "--filed", "--target", target, "--family", family)
    assert code == 0, told


@pinned
@pytest.mark.slow
@pytest.mark.parametrize("target", ARCHS)
def test_everything_compiles_to_what_is_on_file(target):
    code, told = check("--all", "--filed", "--target", target)
    assert code == 0, told


def test_every_kernel_and_architecture_has_entries_and_no_entry_is_of_something_else():
    """A scheme that is new in the core may lack an entry; its claims are then no more than interpreted, see
    below.
    """
    assert set(TARGETS) == set(ARCHS)
    served = {
        (k.family, s.name)
        for k in HOST.kernels("cuda")
        if hasattr(k, "family")
        for s in SCHEMES
        if k.serves(s)
    }
    for target, families in TARGETS.items():
        entries = {(f, s) for f, schemes in families.items() for s in schemes if f != "quantize"}
        assert entries <= served, target
        assert {family for family, _ in entries} == {family for family, _ in served}, target
        assert {entry["outcome"] for schemes in families.values() for entry in schemes.values()} <= OUTCOMES


def test_every_outcome_follows_from_what_was_seen():
    """As ``benchmarks/compile.py`` decides, without compiling, so that an outcome edited by hand fails."""
    matrix = {kernel.family: kernel.matrix for kernel in HOST.kernels("cuda") if hasattr(kernel, "family")}
    for target, families in TARGETS.items():
        for family, schemes in families.items():
            for scheme, entry in schemes.items():
                seen = {i for made in entry["kernels"].values() for i in made["instruction"].split(", ") if i}
                assert entry["instruction"] == ", ".join(sorted(seen)), (target, family, scheme)
                up_cast = any(not i.startswith(matrix.get(family, ())) for i in seen)
                assert ("because" in entry) is (entry["outcome"] == "refused"), (target, family, scheme)
                assert not (up_cast and entry["outcome"] == "native"), (target, family, scheme)
                assert entry["kernels"] or entry["outcome"] == "not compiled", (target, family, scheme)


def test_nothing_that_is_chosen_spills_or_lacks_its_matrix_instruction():
    for target, families in TARGETS.items():
        for family, schemes in families.items():
            for scheme, entry in schemes.items():
                if entry["outcome"] != "native":
                    continue
                for name, made in entry["kernels"].items():
                    assert made["spills"] <= 32, (target, family, scheme, name)
                    assert bool(made["instruction"]) == (name == "gemm"), (target, family, scheme, name)


@pytest.mark.parametrize("target", ARCHS)
def test_a_claim_is_no_stronger_than_its_evidence(target):
    device = HOST.device(f"cuda:{target}")
    for kernel in (k for k in HOST.kernels("cuda") if hasattr(k, "family")):
        for scheme in (s for s in SCHEMES if kernel.serves(s)):
            entry = TARGETS[target][kernel.family].get(scheme.name, NOT_COMPILED)
            for rows in (1, 64, 4096):
                holds(
                    kernel,
                    Request(WeightSpec(scheme, 4096, 4096), "linear", device, device.arch.compute, rows),
                    entry,
                )


def holds(kernel, request, entry):
    """The claim for a request is what the evidence says of its launches."""
    reasons = kernel.reasons_against(request)
    assert reasons or entry["outcome"] == "native" or entry is NOT_COMPILED
    # says the table, and nothing needs to be added
    lacking = "matrix instruction [" in " ".join(map(str, reasons))
    assert any(entry.get("because", "\n") in reason.text for reason in reasons) is (
        entry["outcome"] == "refused" and not lacking
    )
    name = kernel.kernel_of(request)
    seen = entry["kernels"].get(name, {}).get("instruction", "")
    claim = kernel.claim(request)
    assert claim.evidence is (
        Evidence.COMPILED if entry["outcome"] == "native" and seen else Evidence.INTERPRETED
    )
    assert seen in claim.source or claim.evidence is Evidence.INTERPRETED
    assert not (claim.evidence is Evidence.COMPILED and name in ("gemv", "dequantize"))


def test_the_evidence_is_of_the_triton_that_is_pinned():
    pins = (ROOT / "ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"triton=={evidence.read('cuda')['triton']}" in pins


def test_an_architecture_that_nobody_compiled_for_is_interpreted():
    kernel, known = TritonWeightOnly("cuda"), HOST.device("cuda:sm_80")
    orin = replace(known, arch=replace(known.arch, name="sm_87", title="NVIDIA Jetson Orin"))
    request = Request(WeightSpec(HOST.schemes["int4"], 64, 64), "linear", orin, torch.bfloat16)
    assert kernel.claim(request).evidence is Evidence.INTERPRETED
    assert not kernel.reasons_against(request)


@pinned
def test_a_stale_file_is_found(tmp_path):
    """A configuration that changed after the file was made, and an entry for what is no longer launched."""
    source = json.loads(
        (ROOT / "backends/triton/quantport_triton/evidence/cuda.json").read_text(encoding="utf-8")
    )
    entry = source["targets"]["sm_90"]["weight_only"]["nf4"]
    entry["fingerprint"] = "0" * 16
    source["targets"]["sm_90"]["weight_only"]["gone"] = entry
    (tmp_path / "cuda.json").write_text(json.dumps(source), encoding="utf-8")
    code, told = check("--target", "sm_90", "--file", str(tmp_path / "cuda.json"))
    assert code == 1
    assert "/sm_90/weight_only/nf4" in told
    assert "/sm_90/weight_only/gone" in told


def test_an_older_triton_quantizes_nothing_where_it_does_not_compile(monkeypatch):
    weight = torch.ones(4, 64)
    with traced("sm_103"):
        assert quantize_weight(weight, HOST.schemes["int8"]) is not None
        monkeypatch.setattr(quantport_triton, "version", lambda: (3, 5))
        quantport_triton.compiles_for.cache_clear()
        assert quantize_weight(weight, HOST.schemes["int8"]) is None
        monkeypatch.setattr(launching, "launch", None)
        assert quantize(weight, HOST.schemes["int8"].activation).codes.dtype is torch.int8
    quantport_triton.compiles_for.cache_clear()


@pytest.mark.parametrize(
    ("scheme", "target", "fits"),
    [
        ("mxfp8", "sm_121", False),
        ("int8", "sm_103", False),
        ("int8", "sm_90", True),
        ("fp8_per_channel", "sm_120", True),
    ],
)
def test_an_older_triton_is_refused_where_it_does_not_compile(scheme, target, fits, monkeypatch):
    monkeypatch.setattr(base, "version", lambda: (3, 5))
    here = replace(HOST.device(f"cuda:{target}"), simulated=False)
    request = Request(WeightSpec(HOST.schemes[scheme], 64, 64), "linear", here, torch.bfloat16)
    family = {"mxfp8": "mx", "fp8_per_channel": "fp8"}.get(scheme, scheme)
    (kernel,) = (k for k in HOST.kernels("cuda") if getattr(k, "family", "") == family)
    told = [
        reason
        for reason in kernel.reasons_against(request)
        if "Triton 3.5 does not compile it" in reason.text
    ]
    assert bool(told) is not fits


CHANGES = """
import triton.language as tl
from quantport_triton.evidence import machine_code
from quantport_triton.ops import decode, scaled, weight_only

def seen(kernel):
    machine_code._sources.cache_clear()
    return machine_code._sources(kernel)

before = seen(scaled.gemm), seen(weight_only.gemm)
scaled.MAX_BAND_HEIGHT = tl.constexpr(4)
assert seen(scaled.gemm) != before[0], "a constant of the module"
assert seen(weight_only.gemm) == before[1], "which others do not read"
decode.decode_unscaled._src = decode.decode_unscaled.src.replace("8388608", "8388609")
assert seen(weight_only.gemm) != before[1], "a function that is called"
"""


@pinned
def test_a_fingerprint_sees_what_a_kernel_is_made_of():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CHANGES], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
