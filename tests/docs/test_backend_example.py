"""The backend of ``docs/backends.md`` is a real plugin: installed, it is found, chosen, and passes the conformance suite."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from docs_pages import ROOT, blocks

import quantport
from quantport.host import host

FILES = {b.notes["file"]: b.text for b in blocks(ROOT / "docs" / "backends.md") if "file" in b.notes}
(ENTRY,) = blocks(ROOT / "docs" / "backends.md", "toml")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder on the path with the plugin and its metadata, as pip would leave them."""
    folder = tmp_path_factory.mktemp("site")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    info = folder / "quantport_toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quantport-toy\nVersion: 1.0\n", encoding="utf-8")
    lines = ENTRY.text.replace('[project.entry-points."quantport.backends"]', "[quantport.backends]").replace('"', "")
    (info / "entry_points.txt").write_text(lines, encoding="utf-8")
    return folder


def installed(site, *call: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs Python where the plugin is installed."""
    environment = {**os.environ, "PYTHONPATH": str(site), **variables}
    return subprocess.run([sys.executable, *call], cwd=site, capture_output=True, text=True, check=False, env=environment)


def test_it_is_found_and_chosen(site):
    code = (
        "import quantport; print(*quantport.devices());"
        f"m = quantport.load({str(ROOT / 'examples/models/tiny-llama')!r}, device='toy');"
        "print(m.quantport_plan.why); print({s.choice.kernel for s in m.quantport_plan.quantized})"
    )
    done = installed(site, "-W", "error::RuntimeWarning", "-c", code)
    assert done.returncode == 0, done.stderr
    devices, why, kernels = done.stdout.splitlines()
    assert devices.startswith("toy:0 (v2) cpu:0")
    assert why.startswith("int8: W8A8 by toy.int8")
    assert kernels == "{'toy.int8'}"


def test_it_passes_the_conformance_suite(site):
    """All of it but the slow inductor check, which is of the portable kernels."""
    chosen = ("-k", "not test_inductor and not torch.", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-rs")
    done = installed(site, "-m", "pytest", "test_conformance.py", *chosen, QUANTPORT_BACKENDS="toy")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "toy.int8" not in done.stdout.partition("short test summary info")[2], "nothing of the kernel was skipped"


def test_it_is_not_installed_here():
    assert "toy" not in host().backends
    assert quantport.devices()
