"""The generated pages are current, and the same on every machine."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from docs_pages import ROOT

spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


PAGES = ["docs/matrix.md", "docs/architecture.md", "docs/checkpoints.md", "README.md"]


@pytest.mark.parametrize("path", [*PAGES, *(f"backends/{kind}/README.md" for kind in generate.ROOMS)])
def test_current(path):
    stale = generate.generated()[ROOT / path] != (ROOT / path).read_text(encoding="utf-8")
    assert not stale, f"{path} is stale: run `make docs`"


def test_every_architecture_is_in_the_matrix_and_in_a_group_of_each_summary():
    cells = generate.matrix()
    archs = {c.arch for c in cells}
    text = (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8")
    assert not [a for a in archs if f"| `{a}` {a.title} |" not in text]
    grouped = [a for a in archs if any(belongs(a) for _, belongs in generate.README_ROWS)]
    assert {str(a) for a in archs - set(grouped)} == {"cpu:generic"}
    for groups in (generate.README_ROWS, generate.OMNI_ROWS, generate.VLLM_COLUMNS):
        assert not [label for label, belongs in groups if not any(belongs(a) for a in archs)]


def test_marks_are_those_of_the_command_line():
    """Every status has a mark, and the two tables use the same."""
    from quantport.cli.show import MARKS
    from quantport.kernels.verdict import Status

    assert set(generate.MARKS) == {str(s) for s in Status}
    assert generate.MARKS == MARKS


def test_every_cell_is_in_the_table_of_outcomes():
    cells = [c for c in generate.matrix() if c.arch.kind in ("cpu", "npu")]
    rows = generate.by_outcome(cells).splitlines()[2:]
    for cell in cells:
        scheme, layer = f"`{re.escape(cell.scheme)}`", re.escape(f"({cell.layer})")
        here = re.compile(
            rf"\| `{cell.arch}` .*{scheme}( {layer}|(?! \()).*`{re.escape(cell.choice.kernel)}`"
        )
        (row,) = [r for r in rows if here.match(r)]
        assert cell.choice.precision in row
        assert all(reason in row for reason in cell.choice.reasons)


def test_a_fold_keeps_every_outcome():
    cells = [c for c in generate.matrix("int8") if c.arch.kind == "cpu"]
    folded = generate.fold(cells)
    assert all(f"{generate.MARKS[str(c.choice.status)]} {c.choice.precision}" in folded for c in cells)


def test_another_machine_writes_the_same():
    """torch pretends to be on a processor without vector instructions, and numba to compile nothing."""
    call = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default", "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_page_of_architectures_is_current():
    """In a process of its own: it silences warnings."""
    code = (
        "import sys; sys.path.insert(0, 'docs'); import architectures_page as p; sys.stdout.write(p.page())"
    )
    env = os.environ | {"PYTHONPATH": "tests/core"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=env
    )
    assert done.stdout == (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
