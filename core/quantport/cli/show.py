"""Pages of the devices and of the matrix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from quantport.cli.page import Column, Grid, Page, size
from quantport.device import Device
from quantport.planning.capability_matrix import Cell

MARKS = {"native": "✅", "weight_only": "🟡", "dequantize": "🟠", "reference": "🔵", "unsupported": "❌"}
_LEGEND = {
    "native": "as asked",
    "weight_only": "the weights as asked, 16-bit activations",
    "dequantize": "as asked, through a 16-bit copy",
    "reference": "exact emulation, slow",
    "unsupported": "nothing runs it",
}


def device_dict(device: Device) -> dict[str, Any]:
    """Plain data of a device."""
    return {
        "device": f"{device.kind}:{device.index}",
        "arch": device.arch.name,
        "title": device.arch.title,
        "name": device.name,
        "memory": device.memory,
        "native": sorted(device.arch.native),
        "features": sorted(device.features),
    }


def devices_page(devices: Sequence[Device]) -> Page:
    """Devices, best first."""
    names = (
        Column("device"),
        Column("architecture"),
        Column("title", 2),
        Column("name", 1),
        Column("memory", right=True),
    )
    rows = []
    for d in devices:
        memory = size(d.memory) if d.memory else "unknown"
        native = ", ".join(sorted(d.arch.native)) or "-"
        rows.append((f"{d.kind}:{d.index}", d.arch.name, d.arch.title, d.name, memory, native))
    page = Page(
        [device_dict(d) for d in devices], [Grid((*names, Column("multiplies natively", prose=True)), rows)]
    )
    if not devices:
        page.say("no device was found: run `quantport doctor`", "warn")
    return page


_DETAILS = (
    Column("device"),
    Column("scheme"),
    Column("layer"),
    Column("asked", 4),
    Column("status", 1),
    Column("effective"),
    Column("activations", 5),
    Column("kernel", 2),
    Column("evidence", 3),
    Column("reason", prose=True),
)


def matrix_page(cells: Sequence[Cell], detailed: bool) -> Page:
    """The matrix: one row for each cell with its reasons, or one mark for each cell."""
    page = Page(lambda: [c.to_dict() for c in cells], title="quantport matrix")
    if detailed:
        page.blocks.append(Grid(_DETAILS, [_details(c) for c in cells]))
        if len({c.arch for c in cells}) == 1:
            sources = dict.fromkeys(
                f"{c.choice.kernel}: {c.choice.claim.evidence}: {c.choice.claim.source}"
                for c in cells
                if c.choice.claim
            )
            page.say("\n" + "\n".join(sources), "dim")
        return page
    for layer in dict.fromkeys(c.layer for c in cells):
        schemes, rows = _overview([c for c in cells if c.layer == layer])
        title = "MoE experts" if layer == "moe" else f"{layer.capitalize()} layers"
        columns = [Column("device"), *(Column(s) for s in schemes)]
        page.blocks.append(Grid(columns, [(device, *marks) for device, _, marks in rows], title, split=True))
    page.say("\n" + "\n".join(f"{MARKS[status]} {status}: {text}" for status, text in _LEGEND.items()))
    page.say(
        "Kernels and reasons of some cells: --device KIND:ARCH or --scheme SCHEME. Of all of them: "
        "--format markdown.",
        "dim",
    )
    return page


def _details(cell: Cell) -> tuple[str, ...]:
    choice = cell.choice
    evidence = str(choice.claim.evidence) if choice.claim else "-"
    speed = "" if choice.speed is None else f" ({choice.speed:.1f}x BF16)"
    # the source is in the other formats
    shown = [re.sub(r" \[[^\[\]]*\]$", "", reason) for reason in choice.reasons[:1]]
    reasons = "; ".join([choice.numeric_deviation] * bool(choice.numeric_deviation) + shown)
    mark = f"{MARKS[str(choice.status)]} {choice.status}"
    kernel = choice.kernel + speed or "-"
    effective, activations = choice.precision or "-", choice.activations if choice.kernel else "-"
    return (
        str(cell.arch),
        cell.scheme,
        cell.layer,
        cell.requested_precision,
        mark,
        effective,
        activations,
        kernel,
        evidence,
        reasons,
    )


def _overview(cells: Sequence[Cell]) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
    """Schemes, and for each architecture its name, title and one mark for each scheme."""
    schemes = list(dict.fromkeys(c.scheme for c in cells))
    rows: dict[str, tuple[str, str, list[str]]] = {}
    for c in cells:
        rows.setdefault(str(c.arch), (str(c.arch), c.arch.title, []))[2].append(
            f"{MARKS[str(c.choice.status)]} {c.choice.precision}".strip()
        )
    return schemes, list(rows.values())


def matrix_markdown(cells: Sequence[Cell]) -> str:
    """The matrix as markdown, one table for each kind of layer, architectures down and schemes across; then
    the reasons.

    Machine-dependent numbers (measured speeds) are left out, so that the text is the same everywhere.
    """
    out = []
    for layer in dict.fromkeys(c.layer for c in cells):
        schemes, rows = _overview([c for c in cells if c.layer == layer])
        out += ["## MoE experts" if layer == "moe" else f"## {layer.capitalize()}", ""]
        out += [
            "| device | " + " | ".join(f"`{s}`" for s in schemes) + " |",
            "|---" * (len(schemes) + 1) + "|",
        ]
        out += [f"| `{device}` {title} | " + " | ".join(marks) + " |" for device, title, marks in rows]
        out.append("")
    out += ["## Kernel, evidence and reason of each cell", ""]
    out += [
        "| device | scheme | layer | asked | effective | kernel | evidence | reason |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in cells:
        evidence = f"{c.choice.claim.evidence}: {c.choice.claim.source}" if c.choice.claim else ""
        fields = (
            f"`{c.arch}`",
            f"`{c.scheme}`",
            c.layer,
            c.requested_precision,
            c.choice.precision,
            f"`{c.choice.kernel}`",
            evidence,
        )
        out.append("| " + " | ".join((*fields, "; ".join(c.choice.reasons[:1]).replace("|", "\\|"))) + " |")
    return "\n".join(out)
