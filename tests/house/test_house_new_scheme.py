"""A scheme is added to the core without touching the tests of any vendor's room."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from house_source import ROOT

# Loaded by pytest before any test module, so that it is a scheme of the core like every other.
NEWCOMER = """
from quantport.scheme import Quant, Scheme, catalog

token = Quant("int8", (1, 0))
catalog.BUILTIN = catalog.Schemes((
    *catalog.BUILTIN.values(),
    Scheme("int8_newcomer", Quant("int8", (1, 48)), token, "INT8 weights in groups of 48; INT8 activations"),
    Scheme("fp8_newcomer", Quant("e4m3fn", (1, 80)), None, "FP8 weights in groups of 80"),
))


def pytest_sessionfinish():
    from quantport.plugins.registry import default_registry

    print({"int8_newcomer", "fp8_newcomer"} - set(default_registry().schemes) or "all are there")
"""


@pytest.mark.slow
@pytest.mark.parametrize("room", sorted(p.name for p in (ROOT / "backends").iterdir() if p.is_dir()))
def test_a_scheme_of_the_core_needs_no_change_to_the_tests_of_a_room(room, tmp_path):
    (tmp_path / "newcomer.py").write_text(NEWCOMER)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    chosen = "newcomer or not conformance"
    command = [sys.executable, "-m", "pytest", "-p", "newcomer", "-m", "not slow", "-k", chosen]
    done = subprocess.run(
        [*command, f"tests/backends/{room}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "all are there" in done.stdout
