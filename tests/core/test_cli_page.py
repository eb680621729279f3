"""Pages: the same values as table, markdown, html and json, at every width."""

from __future__ import annotations

import json

import pytest
from core_models import DENSE, MOE
from rich.cells import cell_len
from typer.testing import CliRunner

from quantport.cli import app, page
from quantport.cli.page import Column, Grid, Page
from quantport.cli.plans import _braced

COMMANDS = (
    ("devices",),
    ("doctor",),
    ("matrix",),
    ("matrix", "--device", "cuda:sm_80"),
    ("plan", str(DENSE), "--scheme", "int8", "--device", "cpu:x86_vnni"),
    ("plan", str(MOE), "--scheme", "fp8_per_tensor", "--device", "cuda:sm_80"),
)


@pytest.mark.parametrize("width", [80, 120, 180])
@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_tables_fit(args, width):
    result = CliRunner().invoke(app, list(args), env={"COLUMNS": str(width)})
    assert result.exit_code == 0
    assert max(cell_len(line) for line in result.stdout.splitlines()) <= width
    assert "│" not in result.stdout


@pytest.mark.parametrize("args", COMMANDS[4:], ids=" ".join)
def test_no_row_of_a_plan_is_broken_at_80_columns(args):
    text = CliRunner().invoke(app, list(args), env={"COLUMNS": "80"}).stdout
    rows = text.split("─\n")[1].split("not shown")[0].splitlines()
    assert all(row.startswith(("model.", "lm_head", "other")) for row in rows)


def test_a_pipe_gets_whole_rows():
    text = CliRunner().invoke(app, ["matrix", "--device", "cuda:sm_80"], env={"COLUMNS": ""}).stdout
    table, _, sources = text.partition("\n\n")
    rows = table.splitlines()[2:]
    assert rows
    assert all(row.startswith("cuda:sm_80") for row in rows)
    assert sources.startswith("cuda.")


GRID = Grid(
    (Column("name"), Column("size", right=True), Column("why", 1, prose=True)),
    (("a|b", "1", "<b>\nc"),),
    "things",
)


def emitted(capsys, form: str, data: object = None) -> str:
    shown = Page(data, [GRID], "title")
    shown.say("and & more", "warn")
    page.emit(shown, form)
    return capsys.readouterr().out


def test_markdown_escapes(capsys):
    assert emitted(capsys, "markdown") == (
        "**things**\n\n| name | size | why |\n| --- | ---: | --- |\n| a\\|b | 1 | <b><br>c |\n\nand & more\n"
    )


def test_html_escapes(capsys):
    text = emitted(capsys, "html")
    assert "&lt;b&gt;" in text
    assert "and &amp; more" in text
    assert "<td class=right>1</td>" in text


def test_json_is_strict(capsys):
    text = emitted(capsys, "json", {"a": [float("inf"), float("nan"), 1.5], "b": {1: None}})
    assert json.loads(text) == {"a": [None, None, 1.5], "b": {"1": None}}
    assert "NaN" not in text


def test_names_of_hidden_columns_are_told(capsys, monkeypatch):
    long = Grid(GRID.columns, (("a|b", "1", "because " * 9),), "things")
    monkeypatch.setenv("COLUMNS", "20")
    page.emit(Page(None, [long]))
    text = capsys.readouterr().out
    assert "why" not in text.splitlines()[1]
    assert "not shown at 20" in text
    monkeypatch.setenv("COLUMNS", "wide")
    assert "<b>" in emitted(capsys, "table")


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"1", "2", "3"}, "{1-3}"),
        ({"1", "10", "2"}, "{1,2,10}"),
        (set(map(str, range(0, 20, 2))), "{0,2,...,18}"),
        ({"a", "b"}, "{a,b}"),
        ({"a", "b", "c", "d"}, "{a,b,c,...}"),
    ],
)
def test_what_differs_in_a_group(parts, text):
    assert _braced(parts) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2.5e9, "2.5 GB"), (3e15, "3000.0 TB")]
)
def test_sizes(count, text):
    assert page.size(count) == text
