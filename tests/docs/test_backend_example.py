"""The backend of ``docs/backends.md`` is a real plugin: installed, it is found, chosen, and passes the
conformance suite.
"""

from __future__ import annotations

import os
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from docs_pages import ROOT, blocks

import quantport
from quantport.plugins.registry import default_registry

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
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: quantport-toy\nVersion: 1.0\n", encoding="utf-8"
    )
    lines = ENTRY.text.replace('[project.entry-points."quantport.backends"]', "[quantport.backends]").replace(
        '"', ""
    )
    (info / "entry_points.txt").write_text(lines, encoding="utf-8")
    return folder


def installed(site, *call: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs Python where the plugin is installed."""
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run(
        [sys.executable, *call], cwd=site, capture_output=True, text=True, check=False, env=environment
    )


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


TRIPLES = """
import itertools, torch
from quantport.backend import Accepted, Request, WeightSpec
from quantport.plugins.registry import default_registry
from quantport.testing import cases
(device,) = default_registry().devices
(kernel,) = [k for k in default_registry().kernels("toy") if k.name == "toy.int8"]
for scheme, dtype in itertools.product(default_registry().schemes.values(), cases.DTYPES):
    sizes = [(n, k, layer) for n, k in cases.SHAPES for layer in cases.LAYERS]
    asked = [Request(WeightSpec(scheme, n, k), layer, device, dtype, 1) for n, k, layer in sizes]
    if any(isinstance(kernel.verdict(request), Accepted) for request in asked):
        print(f"toy.int8-{scheme.name}-{cases.FORMAT_OF[dtype]}")
"""


def test_it_passes_the_conformance_suite(site, tmp_path):
    """All of it but the slow inductor check, which is of the portable kernels; and each test that passes says
    what it compared.
    """
    report = tmp_path / "report.xml"
    chosen = (
        "-k",
        "not test_inductor",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-q",
        f"--junitxml={report}",
    )
    done = installed(site, "-m", "pytest", "test_conformance.py", *chosen, QUANTPORT_BACKENDS="toy")
    assert done.returncode == 0, done.stdout[-4000:]
    tests = {case.attrib["name"]: case for case in ElementTree.parse(report).iter("testcase")}
    skipped = {name for name, case in tests.items() if case.find("skipped") is not None}
    assert not skipped
    compared = {
        name: int(value.attrib["value"])
        for name, case in tests.items()
        for value in case.iter("property")
        if value.attrib["name"] == "checked"
    }
    assert set(compared) == set(tests)
    assert min(compared.values()) > 0
    triples = installed(site, "-c", TRIPLES, QUANTPORT_BACKENDS="toy").stdout.split()
    assert len(triples) == 3
    for check in ("test_accepted_runs", "test_special_weights"):
        assert [name for name in tests if name.startswith(f"{check}[toy.")] == [
            f"{check}[{triple}]" for triple in triples
        ]
    own = [name for name in tests if "[torch." not in name]
    assert len(own) > len(tests) / 2, "most of a newcomer's tests are of their own kernels"
    assert len(tests) < 100


def test_it_is_not_installed_here():
    assert "toy" not in default_registry().backends
    assert quantport.devices()
