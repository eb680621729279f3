"""Turns values into tables, markdown and JSON. Decides nothing."""

from __future__ import annotations

import html
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from quantport.device import Device
from quantport.host import Host
from quantport.matrix import Cell
from quantport.plan import Plan, Step

_MARK = {"native": "✅", "weight_only": "🟡", "dequantize": "🟠", "reference": "🔵", "unsupported": "❌"}


def console() -> Console:
    """A console on stdout; wide when it is no terminal, so that piped tables keep their columns."""
    return Console() if sys.stdout.isatty() else Console(width=180)


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr with bytes, rate and time left; silent when stderr is no terminal."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, _name: bar.update(task, completed=done, total=total)


def size(count: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table."""
    out = Table(title=title, title_justify="left")
    for column in columns:
        out.add_column(column, overflow="fold")
    return out


def device_dict(device: Device) -> dict[str, Any]:
    """Plain data of a device."""
    return {
        "device": f"{device.kind}:{device.index}",
        "arch": device.arch.name,
        "title": device.arch.title,
        "name": device.name,
        "memory": device.memory,
        "native": sorted(device.arch.native),
    }


def device_table(devices: Sequence[Device]) -> Table:
    """Devices, best first."""
    out = table("device", "architecture", "name", "memory", "multiplies natively")
    for d in devices:
        memory = size(d.memory) if d.memory else "unknown"
        out.add_row(
            f"{d.kind}:{d.index}", f"{d.arch.name} ({d.arch.title})", d.name, memory, ", ".join(sorted(d.arch.native)) or "-"
        )
    return out


def _cell_row(cell: Cell) -> tuple[str, ...]:
    choice = cell.choice
    evidence = str(choice.claim.evidence) if choice.claim else ""
    speed = "" if choice.speed is None else f" ({choice.speed:.1f}x BF16)"
    reasons = "; ".join(([choice.deviation] if choice.deviation else []) + list(choice.reasons[:1]))
    mark = f"{_MARK[str(choice.status)]} {choice.status}"
    return str(cell.arch), cell.scheme, cell.layer, cell.asked, mark, choice.precision, choice.kernel + speed, evidence, reasons


_MATRIX = ("device", "scheme", "layer", "asked", "status", "effective", "kernel", "evidence", "reason")


def matrix_table(cells: Sequence[Cell]) -> Table:
    """The matrix for a terminal."""
    out = table(*_MATRIX)
    for cell in cells:
        out.add_row(*_cell_row(cell))
    return out


def matrix_markdown(cells: Sequence[Cell]) -> str:
    """The matrix as markdown, one table for each kind of layer, architectures down and schemes across; then the reasons.

    Machine-dependent numbers (measured speeds) are left out, so that the text is the same everywhere.
    """
    out = []
    schemes = list(dict.fromkeys(c.scheme for c in cells))
    for layer in dict.fromkeys(c.layer for c in cells):
        here = [c for c in cells if c.layer == layer]
        out += [f"## {layer.capitalize() if layer != 'moe' else 'MoE experts'}", ""]
        out += ["| device | " + " | ".join(f"`{s}`" for s in schemes) + " |", "|---" * (len(schemes) + 1) + "|"]
        for arch in dict.fromkeys(c.arch for c in here):
            row = {c.scheme: c for c in here if c.arch == arch}
            marks = [f"{_MARK[str(row[s].choice.status)]} {row[s].choice.precision}" for s in schemes]
            out.append(f"| `{arch}` {arch.title} | " + " | ".join(marks) + " |")
        out.append("")
    out += ["## Kernel, evidence and reason of each cell", ""]
    out += ["| device | scheme | layer | asked | effective | kernel | evidence | reason |", "|---|---|---|---|---|---|---|---|"]
    for c in cells:
        evidence = f"{c.choice.claim.evidence}: {c.choice.claim.source}" if c.choice.claim else ""
        fields = (f"`{c.arch}`", f"`{c.scheme}`", c.layer, c.asked, c.choice.precision, f"`{c.choice.kernel}`", evidence)
        out.append("| " + " | ".join((*fields, "; ".join(c.choice.reasons[:1]))) + " |")
    return "\n".join(out)


def matrix_html(cells: Sequence[Cell]) -> str:
    """The matrix as one HTML table."""
    head = "".join(f"<th>{h}</th>" for h in _MATRIX)
    rows = "\n".join("<tr>" + "".join(f"<td>{html.escape(f)}</td>" for f in _cell_row(c)) + "</tr>" for c in cells)
    return f"<!doctype html>\n<meta charset=utf-8>\n<title>quantport matrix</title>\n<table>\n<tr>{head}</tr>\n{rows}\n</table>"


def print_plan(plan: Plan) -> None:
    """The plan: one row for each group of like layers, then totals and the reasons."""
    columns = ("layers", "asked", "effective", "activations", "kernel", "before", "after", "evidence", "note")
    out = table(*columns, title=f"{plan.source} on {plan.device}")
    notes: dict[str, None] = {}
    for steps in _groups(plan.steps):
        first = steps[0]
        names = first.layer.name if len(steps) == 1 else f"{first.layer.name} ... ({len(steps)} layers)"
        before, after = sum(s.before for s in steps), sum(s.after for s in steps)
        choice = first.choice
        effective = f"{choice.precision} {choice.status}" if choice else "as stored"
        activations, kernel = (choice.activations, choice.kernel) if choice else ("-", "-")
        evidence = str(choice.claim.evidence) if choice and choice.claim else ""
        sizes = (size(before), size(after))
        out.add_row(names, first.asked or "-", effective, activations, kernel, *sizes, evidence, first.note)
        if choice:
            notes.update(dict.fromkeys(f"{first.asked}: {r}" for r in choice.reasons))
            if choice.deviation:
                notes[f"{first.asked}: deviates from the scheme: {choice.deviation}"] = None
    view = console()
    view.print(out)
    if plan.why:
        view.print(f"chosen by the device: {plan.why}")
    for note in notes:
        view.print(f"reason: {note}", markup=False, highlight=False)
    slow = sum(s.slow for s in plan.steps)
    if slow:
        view.print(f"warning: {slow} layers are slower than BF16 on this path", style="yellow")
    saved = 1 - plan.after / plan.before if plan.before else 0
    view.print(f"total: {size(plan.before)} -> {size(plan.after)} ({saved:.0%} less), peak while loading at most {size(plan.peak)}")


def _groups(steps: Sequence[Step]) -> list[list[Step]]:
    """Steps that share everything but their place in the model."""
    out: dict[object, list[Step]] = {}
    for step in steps:
        leaf = step.layer.name.rpartition(".")[2] if step.layer.kind != "other" else "other"
        key = (leaf, step.layer.kind, step.layer.weights if step.layer.kind != "other" else (), step.asked, step.choice, step.note)
        out.setdefault(key, []).append(step)
    return list(out.values())


def bench_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Ratios against BF16, one row for each scheme and number of rows."""
    out = table("scheme", "kernel", "rows", "x BF16", "x BF16 prepacked", "x limit")
    for r in rows:
        numbers = (f"{r[k]:.2f}" if r[k] is not None else "-" for k in ("vs_bf16", "vs_prepacked", "vs_limit"))
        out.add_row(r["scheme"], r["kernel"], str(r["rows"]), *numbers)
    return out


def doctor_dict(host: Host, advice: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Plain data of the doctor's findings."""
    return {
        "backends": sorted(host.backends),
        "schemes": list(host.schemes),
        "devices": [device_dict(d) for d in host.devices],
        "problems": [vars(p) for p in host.problems],
        "advice": {kind: list(lines) for kind, lines in advice.items() if lines},
    }


def print_doctor(host: Host, advice: Mapping[str, Sequence[str]]) -> None:
    """Backends, what they found, what is missing, and what broke."""
    view = console()
    out = table("backend", "devices", "kernels", "advice")
    for kind in sorted(host.backends):
        found = [str(d) for d in host.devices if d.kind == kind]
        out.add_row(kind, ", ".join(found) or "none found", str(len(host.kernels(kind))), "\n".join(advice[kind]) or "-")
    view.print(out)
    if not host.problems:
        view.print("no plugin was set aside", style="green")
    for p in host.problems:
        view.print(f"plugin {p.plugin!r} was set aside at {p.stage}: {p.error}", style="red", markup=False)
