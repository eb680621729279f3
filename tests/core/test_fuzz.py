"""Thousands of hostile headers, indexes and configurations: no raw exception, no hang, bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import core_fuzz
import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bounds memory as Linux does")


def failures(first: int, count: int) -> list[dict]:
    command = [sys.executable, core_fuzz.__file__, str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=Path.cwd())
    *failed, summary = map(json.loads, done.stdout.splitlines() or ["null"])
    assert summary, done.stderr[-2000:]
    assert summary["cases"] == count
    assert summary["read"] > count // 50, "what is refused at the door tests no more than the door"
    return failed


def test_a_thousand_cases():
    assert not failures(0, 1000)


@pytest.mark.slow
def test_ten_thousand_cases():
    assert not failures(1000, 10_000)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("raise ZeroDivisionError('raw')", "ZeroDivisionError"),
        ("while True: pass", "Slow"),
        ("hoard = bytearray(600_000_000)", "MemoryError"),  # in one piece: no page of it is ever written
    ],
    ids=["raw", "hang", "memory"],
)
def test_the_program_catches_what_it_is_for(body, error, tmp_path):
    program = Path(core_fuzz.__file__)
    text = program.read_text(encoding="utf-8").replace("    r = random.Random(seed)\n", f"    {body}\n", 1)
    (tmp_path / "core_fakes.py").write_text((program.parent / "core_fakes.py").read_text(encoding="utf-8"))
    broken = tmp_path / "broken.py"
    broken.write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, broken, "0", "1"], capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout.splitlines()[0])["error"] == error, done.stderr[-2000:]
