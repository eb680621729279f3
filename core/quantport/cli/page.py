"""A page: what a command has to say, as values, and its four forms: table, markdown, json and html. Decides
nothing.
"""

from __future__ import annotations

import html
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from quantport.cli.output import pages, write

_WRAPPED = 32  # cells that a column of prose needs at least
_ENDLESS = 1_000_000  # cells: what no terminal shows is never wrapped
_STYLES = {"plain": "", "good": "green", "warn": "yellow", "bad": "red", "dim": "dim"}


@dataclass(frozen=True)
class Column:
    """A column of a grid.

    Attributes:
        name: Its head.
        rank: 0 stays; of the others, the highest is left out first where the terminal is narrow.
        right: Numbers: set to the right.
        prose: May be wrapped.
    """

    name: str
    rank: int = 0
    right: bool = False
    prose: bool = False


@dataclass(frozen=True)
class Grid:
    """Rows of texts under columns; ``split`` breaks a wide one into several under its first column."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    title: str = ""
    split: bool = False


@dataclass(frozen=True)
class Line:
    """A paragraph; ``tone`` is plain, good, warn, bad or dim."""

    text: str
    tone: str = "plain"


@dataclass
class Page:
    """What a command has to say: ``data`` for machines, ``blocks`` for people."""

    data: Any
    blocks: list[Grid | Line] = field(default_factory=list)
    title: str = "quantport"

    def say(self, text: str, tone: str = "plain") -> None:
        """Adds a paragraph."""
        self.blocks.append(Line(text, tone))


def emit(page: Page, form: str = "table") -> None:
    """Writes a page to stdout in one of the four forms."""
    if form == "json":
        write(json.dumps(_strict(page.data), indent=2, default=str, allow_nan=False))
    elif form == "markdown":
        write("\n\n".join(_markdown(block) for block in page.blocks))
    elif form == "html":
        write(_html(page))
    else:
        _print(page)


def _strict(value: Any) -> Any:
    """JSON knows no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def width() -> int:
    """Cells of a line: of the terminal; without one, ``COLUMNS``, or no limit at all, so that pipes get whole
    rows.
    """
    if pages().isatty():
        return Console(file=pages()).width
    columns = os.environ.get("COLUMNS", "")
    return max(20, int(columns)) if columns.isascii() and columns.isdigit() else _ENDLESS


def _print(page: Page) -> None:
    target = io.StringIO()
    tty = pages().isatty()
    view = Console(
        file=target, width=width(), force_terminal=tty or None, emoji=False, markup=False, highlight=False
    )
    for i, block in enumerate(page.blocks):
        if isinstance(block, Line):
            view.print(Text(block.text), style=_STYLES[block.tone], soft_wrap=view.width == _ENDLESS)
            continue
        if i:
            view.print()
        _print_grid(view, block)
    text = target.getvalue().rstrip("\n")
    write(text if tty else "\n".join(line.rstrip() for line in text.split("\n")))


def _print_grid(view: Console, grid: Grid) -> None:
    if grid.title:
        view.print(Text(grid.title), style="bold", soft_wrap=view.width == _ENDLESS)
    if grid.split:
        for part in _parts(view, grid):
            view.print(part)
        return
    columns = list(range(len(grid.columns)))
    hidden: list[str] = []
    while _natural(view, grid, columns) > view.width:
        last = max(columns, key=lambda c: grid.columns[c].rank)
        if not grid.columns[last].rank:
            break
        columns.remove(last)
        hidden.append(grid.columns[last].name)
    fold = _natural(view, grid, columns) > view.width
    view.print(_table(grid, columns, fold))
    if hidden:
        view.print(
            f"not shown at {view.width} columns: {', '.join(reversed(hidden))} (--json has all)", style="dim"
        )


def _parts(view: Console, grid: Grid) -> Iterator[Table]:
    """Tables that each fit, all with the first column."""
    columns, first = [0], _natural(view, grid, [0])
    width = first
    for c in range(1, len(grid.columns)):
        more = _natural(view, grid, [0, c]) - first  # widths add up, and measuring a wide table takes long
        if len(columns) > 1 and width + more > view.width:
            yield _table(grid, columns, False)
            columns, width = [0], first
        columns.append(c)
        width += more
    yield _table(grid, columns, False)


def _natural(view: Console, grid: Grid, columns: Sequence[int]) -> int:
    """Cells that a table needs when only prose is wrapped."""
    options = view.options.update(width=_ENDLESS)
    return Measurement.get(view, options, _table(grid, columns, False, _WRAPPED)).maximum


def _table(grid: Grid, columns: Sequence[int], fold: bool, prose: int | None = None) -> Table:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), header_style="bold")
    for column in (grid.columns[c] for c in columns):
        wrapped = column.prose or fold
        out.add_column(
            Text(column.name),
            justify="right" if column.right else "left",
            overflow="fold",
            no_wrap=not wrapped,
            max_width=prose if column.prose else None,
        )
    for row in grid.rows:
        out.add_row(*(Text(row[c]) for c in columns))
    return out


def _markdown(block: Grid | Line) -> str:
    if isinstance(block, Line):
        return block.text
    rows = [
        [c.name for c in block.columns],
        ["---:" if c.right else "---" for c in block.columns],
        *block.rows,
    ]
    text = "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in row) + " |"
        for row in rows
    )
    return f"**{block.title}**\n\n{text}" if block.title else text


def _html(page: Page) -> str:
    return (
        f"<!doctype html>\n<meta charset=utf-8>\n<title>{html.escape(page.title)}</title>\n"
        "<style>body{font-family:sans-serif}td,th{padding:.2em .6em;text-align:left;vertical-align:top}"
        "tr:nth-child(even){background:#f4f4f4}.right{text-align:right}</style>\n"
        + "\n".join(map(_html_block, page.blocks))
    )


def _html_block(block: Grid | Line) -> str:
    if isinstance(block, Line):
        return f"<p>{html.escape(block.text)}</p>"

    def cells(tag: str, row: Sequence[str]) -> str:
        pairs = zip(block.columns, row, strict=True)
        return "".join(
            f"<{tag}{' class=right' if c.right else ''}>{html.escape(text)}</{tag}>" for c, text in pairs
        )

    head = cells("th", [c.name for c in block.columns])
    rows = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in block.rows)
    caption = f"<caption>{html.escape(block.title)}</caption>\n" if block.title else ""
    return f"<table>\n{caption}<tr>{head}</tr>\n{rows}\n</table>"


@contextmanager
def progress(title: str, unit: str = "bytes") -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr, with rate and time left for bytes; silent when stderr is no terminal. Before
    the first byte it says what is done instead.
    """
    columns = [TextColumn("{task.description}"), BarColumn()]
    columns += (
        [DownloadColumn(), TransferSpeedColumn()]
        if unit == "bytes"
        else [TextColumn("{task.completed}/{task.total} " + unit)]
    )
    shown = sys.stderr.isatty()
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown, transient=True
    ) as bar:
        task = bar.add_task(title, total=None)

        def report(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=title if done else f"{title}: {name}")

        yield report


def size(count: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
