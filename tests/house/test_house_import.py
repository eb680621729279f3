"""Importing quantport is light: no vendor runtime, and little time beside that of torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from statistics import median

import house_source as house
import pytest

RUNTIMES = {
    "triton",
    "torch_npu",
    "intel_extension_for_pytorch",
    "torch_xla",
    "transformers",
    "accelerate",
    "diffusers",
    "vllm",
    "pandas",
    "scipy",
    "sklearn",
    "pytest",
    "hypothesis",
    "rich",
    "typer",
    "tokenizers",
    "huggingface_hub",
    "torchao",
}
PROBE = "import json, sys; import {}; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"


def python(*args):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "PYTEST_"))}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=True, env=env)


def imported(what):
    return set(json.loads(python("-c", PROBE.format(what)).stdout))


def test_import_loads_no_runtime():
    fresh = imported("quantport") - imported("torch")
    assert not fresh & RUNTIMES
    assert not {name for name in fresh if name.startswith("quantport_")}, (
        "rooms are found when somebody asks for devices"
    )


def test_a_cache_is_counted_without_transformers():
    """Only quantport.kvcache.layers is made of Transformers' classes, and only making a cache imports it."""
    assert (
        not (imported("quantport.kvcache, quantport.config, quantport.planning.plan") - imported("torch"))
        & RUNTIMES
    )


def test_finding_the_rooms_loads_no_runtime():
    fresh = imported(
        "quantport.plugins.registry; quantport.plugins.registry.default_registry().backends"
    ) - imported("torch")
    assert set(house.entry_points("quantport.backends").values()) <= fresh
    assert not fresh & (RUNTIMES - {"pytest"})


def times():
    """Cumulative import microseconds of quantport and of torch, in one fresh process that imports both."""
    log = python("-X", "importtime", "-c", "import quantport, torch").stderr
    rows = re.findall(r"import time:\s*\d+ \|\s*(\d+) \|\s*(\S+)", log)
    return {name: int(total) for total, name in rows if name in ("quantport", "torch")}


@pytest.mark.slow
def test_import_costs_little_beside_torch():
    """A ratio from one process at a time, since absolute times say more about the machine than about
    quantport.
    """
    runs = [times() for _ in range(5)]
    # it imports the rest, torch too, on first use
    assert median(run["quantport"] / run["torch"] for run in runs) < 0.1


@pytest.mark.parametrize("command", ["devices", "matrix"])
def test_a_command_imports_no_compiler(command):
    code = (
        f"import sys; sys.argv = ['quantport', {command!r}, '--json']\n"
        "from quantport.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch._dynamo', 'torch._inductor', 'transformers') if m in sys.modules])"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        (["matrix"], "quantport.planning.capability_matrix"),
        (["devices"], "quantport.plugins.registry"),
        (["matrix", "--json"], "quantport.planning.capability_matrix"),
    ],
)
def test_what_reads_no_checkpoint_imports_nothing_that_does(command, needed):
    """Nor what converts options that were not given: together they took half of the time of the command."""
    probe = (
        f"import json, sys\nfrom quantport.cli import main\nsys.argv = ['quantport', *{command!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    modules = set(json.loads(python("-c", probe).stderr))
    assert needed in modules
    assert not modules & {
        "pydantic",
        "quantport.checkpoint",
        "quantport.loading.load_model",
        "quantport.modules.ops",
        "quantport_formats.catalog",
        "rich.progress",
    }
