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
from itertools import zip_longest
from typing import Any

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quantport.cli.output import pages, write

_WRAPPED = 32  # cells that a column of prose needs at least
_BETWEEN = "   "  # columns
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
    """What a command has to say: ``data`` for machines (or what makes it, when they ask), ``blocks`` for
    people.
    """

    data: Any
    blocks: list[Grid | Line] = field(default_factory=list)
    title: str = "quantport"

    def say(self, text: str, tone: str = "plain") -> None:
        """Adds a paragraph."""
        self.blocks.append(Line(text, tone))


def emit(page: Page, form: str = "table") -> None:
    """Writes a page to stdout in one of the four forms."""
    if form == "json":
        data = page.data() if callable(page.data) else page.data
        write(json.dumps(_strict(data), indent=2, default=str, allow_nan=False))
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
    widths = [_column_width(grid, c) for c in range(len(grid.columns))]
    if grid.split:
        for columns in _parts(widths, view.width):
            _print_columns(view, grid, columns, widths)
        return
    columns = list(range(len(grid.columns)))
    least = [
        min(width, _WRAPPED) if column.prose else width
        for column, width in zip(grid.columns, widths, strict=True)
    ]
    hidden: list[str] = []
    while _total(least, columns) > view.width:
        last = max(columns, key=lambda c: grid.columns[c].rank)
        if not grid.columns[last].rank:
            break
        columns.remove(last)
        hidden.append(grid.columns[last].name)
    if _total(widths, columns) <= view.width:
        _print_columns(view, grid, columns, widths)
    else:
        view.print(_wrapped(grid, columns, fold=_total(least, columns) > view.width))
    if hidden:
        view.print(
            f"not shown at {view.width} columns: {', '.join(reversed(hidden))} (--json has all)", style="dim"
        )


def _column_width(grid: Grid, column: int) -> int:
    """Cells that a column needs when nothing is wrapped."""
    texts = {grid.columns[column].name, *(row[column] for row in grid.rows)}
    return max(cell_len(line) for text in texts for line in text.split("\n"))


def _total(widths: Sequence[int], columns: Sequence[int]) -> int:
    return sum(widths[c] for c in columns) + len(_BETWEEN) * (len(columns) - 1)


def _parts(widths: Sequence[int], width: int) -> Iterator[list[int]]:
    """Columns side by side that fit, each time with the first one."""
    columns = [0]
    for c in range(1, len(widths)):
        if len(columns) > 1 and _total(widths, [*columns, c]) > width:
            yield columns
            columns = [0]
        columns.append(c)
    yield columns


def _print_columns(view: Console, grid: Grid, columns: Sequence[int], widths: Sequence[int]) -> None:
    """Prints columns in which nothing is wrapped: a wide table of rich takes a second."""

    def line(texts: Sequence[str]) -> str:
        return _BETWEEN.join(
            " " * (widths[c] - cell_len(text)) + text
            if grid.columns[c].right
            else set_cell_size(text, widths[c])
            for c, text in zip(columns, texts, strict=True)
        )

    lines = [
        line(texts)
        for row in grid.rows
        for texts in zip_longest(*(row[c].split("\n") for c in columns), fillvalue="")
    ]
    view.print(Text(line([grid.columns[c].name for c in columns]), "bold"), soft_wrap=True)
    view.print("\n".join(["─" * _total(widths, columns), *lines]), soft_wrap=True)


def _wrapped(grid: Grid, columns: Sequence[int], fold: bool) -> Table:
    """Prose wrapped to what the other columns leave; all columns where even that is too wide."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), header_style="bold")
    for column in (grid.columns[c] for c in columns):
        out.add_column(
            Text(column.name),
            justify="right" if column.right else "left",
            overflow="fold",
            no_wrap=not (column.prose or fold),
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
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

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
            said = title if done else f"{title}: {name}"  # shown at once: imports keep the bar from its turn
            bar.update(task, completed=done, total=total, description=said, refresh=not done)

        yield report


def size(count: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
