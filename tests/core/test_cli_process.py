"""The command line as a process: pipes, terminals, signals and exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from core_models import DENSE
from rich.cells import cell_len

MAIN = "import sys; sys.argv[0] = 'quantport'; from quantport.cli import main; main()"
unix = pytest.mark.skipif(sys.platform == "win32", reason="pipes and terminals of Unix")


def process(*args: object, code: str = MAIN, **settings):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings.pop("env", {})}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **settings)


def test_json_is_alone_on_stdout(tmp_path):
    done = process(
        "plan",
        DENSE.relative_to(Path.cwd()) if DENSE.is_relative_to(Path.cwd()) else DENSE,
        "-s",
        "int8",
        "--json",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["bytes_after"]


def test_a_wrong_request_exits_2_with_three_parts_on_stderr():
    done = process("plan", DENSE, "--scheme", "int9")
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == [
        "ConfigError",
        "asked",
        "found",
        "try",
    ]


def test_a_wrong_request_is_json_on_stdout_where_json_is_asked_for():
    done = process("plan", DENSE, "--scheme", "int9", "--json")
    assert (done.returncode, done.stderr) == (2, "")
    assert list(json.loads(done.stdout)["error"]) == ["type", "asked", "found", "try"]


def test_run_is_silent_but_for_its_answer():
    done = process("run", DENSE, "-s", "int8", "--compare", "--tokens", "2", "--windows", "1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["compare"]["window"] == 256


@unix
def test_an_interrupt_exits_130_without_a_traceback():
    # who runs the tests in the background may be deaf to it
    hear = "signal.signal(signal.SIGINT, signal.default_int_handler); "
    kill = (
        f"import os, signal, quantport; {hear}quantport.devices = lambda: os.kill(os.getpid(), "
        "signal.SIGINT); "
    )
    done = process("devices", code=kill + MAIN)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@unix
def test_an_interrupt_while_loading_is_said_and_leaves_nothing(tmp_path):
    hear = "signal.signal(signal.SIGINT, signal.default_int_handler); "
    kill = (
        f"import os, signal; from quantport.checkpoint import Checkpoint as C; {hear}read = C.read; "
        "C.read = lambda *a: (os.kill(os.getpid(), signal.SIGINT), read(*a))[1]; "
    )
    done = process("quantize", DENSE, tmp_path / "out", "--scheme", "int8", code=kill + MAIN)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.endswith("interrupted\n"), "after what imports may have said"
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


FULL = "import os, sys; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); "


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full disk that is always there")
@pytest.mark.parametrize(
    "args",
    [
        ("plan", DENSE, "-s", "int9", "--json"),
        ("plan", DENSE),
        ("--version",),
        *(
            pytest.param(args, marks=pytest.mark.slow)
            for args in (
                ("matrix", "--json"),
                ("plan", DENSE, "-f", "json"),
                ("doctor",),
                ("--help",),
                ("plan", "--help"),
            )
        ),
    ],
    ids=lambda a: " ".join(map(str, a))[:14],
)
def test_a_full_disk_behind_stdout_is_said(args):
    done = process(*args, code=FULL + MAIN)
    assert done.returncode == 2
    assert done.stderr.splitlines()[:3] == [
        "SaveError",
        "asked: write to stdout",
        "found: No space left on device",
    ]
    assert len(done.stderr.splitlines()) == 4


@unix
def test_a_stdout_that_is_closed_is_said():
    done = process("devices", code="import os, sys; os.close(1); sys.stdout = None; " + MAIN)
    assert done.returncode == 2
    assert "found: it is closed" in done.stderr
    assert "Traceback" not in done.stderr


@unix
def test_a_reader_that_leaves_is_no_error():
    code = "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1); " + MAIN
    done = process("matrix", "--json", code=code)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_stream_that_knows_no_ticks():
    done = process("matrix", "--device", "cpu:generic", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "weight_only" in done.stdout


def test_warnings_are_one_line():
    code = (
        "import warnings, quantport; quantport.devices = lambda: warnings.warn('odd driver', "
        "stacklevel=1) or (); " + MAIN
    )
    done = process("devices", code=code)
    assert (done.returncode, done.stderr) == (0, "warning: odd driver\n")


def terminal(*args: object, **env: str) -> tuple[int, str]:
    """Runs a command in a terminal of 80 columns; returns its exit code and all that it showed."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, "-c", MAIN, *map(str, args)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as running:
        os.close(theirs)
        shown = b""
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # Linux says so when the other side is closed
                break
            if not chunk:
                break
            shown += chunk
    os.close(ours)
    return running.returncode, shown.decode().replace("\r\n", "\n")


@unix
def test_a_terminal_gets_colours_and_its_own_width():
    code, text = terminal("plan", DENSE, "--scheme", "fp8_per_tensor", "--device", "rocm:gfx90a")
    assert code == 0
    assert "\x1b[33m" in text, "warnings are yellow"
    assert all(cell_len(re.sub(r"\x1b\[[\d;]*m", "", line)) <= 80 for line in text.splitlines())


@unix
def test_no_color_is_respected():
    _, text = terminal("plan", DENSE, "--scheme", "fp8_per_tensor", "--device", "cuda:sm_70", NO_COLOR="1")
    assert not re.search(r"\x1b\[[\d;]*3\d[\d;]*m", text)


@unix
def test_an_error_in_a_terminal_is_wrapped_under_its_part():
    code, text = terminal("plan", DENSE, "--scheme", "int9", NO_COLOR="1")
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()]
    assert code == 2
    assert lines[:3] == ["ConfigError", "asked: scheme 'int9'", "found: no scheme has this name"]
    assert lines[3].startswith("try:   did you mean 'int8'?")
    assert lines[4].startswith("       ")


@unix
@pytest.mark.slow
def test_a_terminal_sees_progress(tmp_path):
    code, text = terminal("quantize", DENSE, tmp_path / "out", "--scheme", "int8", COLUMNS="400")
    assert code == 0
    assert "quantizing into" in text
    assert "importing Transformers" in text
