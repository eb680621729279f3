"""Every example of the documentation runs.

``python`` blocks of a page run in order, in one namespace, in a folder of their own that has
``examples/models``; a block after ``<!-- file: NAME -->`` is written to that file instead. In ``console``
blocks every ``$ quantport ...`` runs, and must end with the code of ``<!-- exit: N -->``, else 0; the words
of the output that is shown must be in the real output, unless ``<!-- output: varies -->`` says why not.
``<!-- skip: reason -->`` is for what needs hardware, the network or much time.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
from docs_pages import PAGES, ROOT, Block, blocks, name

from quantport.cli import main

PYTHON = [p for p in PAGES if blocks(p, "python")]
CONSOLE = [p for p in PAGES if blocks(p, "console")]
_WORD = re.compile(r"[a-z][a-z_]{3,}")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with the models of the examples, which is also where modules are found."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")  # the width of the outputs that are shown
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = set(sys.modules)
    yield tmp_path
    for module in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[module], "__file__", "")):
            del sys.modules[module]


def place(block: Block, folder) -> bool:
    """Writes a block that is a file."""
    if "file" in block.notes:
        (folder / block.notes["file"]).write_text(block.text, encoding="utf-8")
    return "file" in block.notes


@pytest.mark.parametrize("page", PYTHON, ids=name)
def test_python(page, folder):
    space = {"__name__": "__main__"}
    for block in blocks(page):
        if place(block, folder) or block.kind != "python" or "skip" in block.notes:
            continue
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        exec(code, space)


def called(words: list[str], capsys) -> tuple[int, str]:
    """Runs the command line in this process, or in one of its own when the example sets variables."""
    variables = dict(w.split("=", 1) for w in words[: words.index("quantport")])
    arguments = words[words.index("quantport") :]
    if variables:
        call = [sys.executable, "-c", "from quantport.cli import main; main()", *arguments[1:]]
        done = subprocess.run(call, capture_output=True, text=True, check=False, env=os.environ | variables)
        return done.returncode, done.stdout + done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
    out, err = capsys.readouterr()
    return code, out + err


def sessions(block: Block) -> list[tuple[str, str]]:
    """Commands with the output that is shown for each."""
    parts = re.split(r"^\$ ", block.text.replace("\\\n", ""), flags=re.MULTILINE)[1:]
    return [(command.strip(), shown) for command, _, shown in (part.partition("\n") for part in parts)]


@pytest.mark.parametrize("page", CONSOLE, ids=name)
def test_console(page, folder, capsys):
    for block in blocks(page):
        if place(block, folder) or block.kind != "console" or "skip" in block.notes:
            continue
        for command, shown in sessions(block):
            words = shlex.split(command, comments=True)
            assert "quantport" in words, (
                f"{name(page)}:{block.line}: only quantport runs here, put {command!r} in a sh block"
            )
            code, output = called(words, capsys)
            where = f"{name(page)}:{block.line}: {command}\n{output}"
            assert code == int(block.notes.get("exit", 0)), where
            absent = set(_WORD.findall(shown)) - set(_WORD.findall(output))
            if "output" not in block.notes:
                assert not absent, where


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_are_of_a_known_kind_and_skips_have_a_reason(page):
    for block in blocks(page):
        assert block.kind in ("python", "console", "sh", "golden", "json", "toml", "text", "mermaid"), (
            f"{name(page)}:{block.line}"
        )
        if "skip" in block.notes:
            assert re.match("hardware|network", block.notes["skip"]), (
                f"{name(page)}:{block.line}: {block.notes['skip']}"
            )


def test_shell_blocks_name_targets_that_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    asked = {
        t for p in PAGES for b in blocks(p, "sh") for t in re.findall(r"^make (\w+)", b.text, re.MULTILINE)
    }
    assert {"demo", "test"} <= asked <= targets


def test_the_readme_command_of_ci():
    """CI runs the test command of the README."""
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
