"""Page and plot of the GPU benchmark, from the JSON of one run. What the JSON lacks is ``not measured``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from gpu_targets import BANDWIDTH, MISSING, ROWS, SHAPES, Data, Row, Target, best, column, judge, targets

ABOUT = (
    "Ratios are of one run: medians of interleaved rounds, weights cold in cache, activation quantization included. Targets hold at",
    "every shape and number of rows that they name; the number is the worst of them, and the columns after it are of that same case.",
    "The limit: bytes over the measured copy bandwidth, or operations over the measured matrix rate, whichever takes longer.",
)
TARGETS = ("", "number", "target", "", "worst case", "torchao", "gemlite", "limit")
LOAD = {"name": "", "seconds": ".2f", "GBps": ".2f", "speed": ".2f", "peak_GiB": ".2f", "allowed_GiB": ".2f"}
WIDTH, LINE, LEFT, SCALE = 900, 18, 330, 90


def grid(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    columns = list(columns)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(
        [*lines, *("| " + " | ".join(str(c).replace("|", "/") for c in row) + " |" for row in rows)]
    )


def reason(data: Data, stage: str) -> str:
    """The text in place of the numbers of a stage."""
    why = data.get(stage, {}).get("missing", "")
    return f"{MISSING}: {why}" if why else MISSING


def noted(data: Data, stage: str, table: str) -> str:
    """A table, and below it the reason where the stage did not end."""
    why = data.get(stage, {}).get("missing")
    return f"{table}\n\nThe rest: {reason(data, stage)}" if why and table.startswith("|") else table


def target_row(target: Target) -> list[str]:
    """One line of the table of targets."""
    number = MISSING if target.measured is None else f"{target.measured:.2f}{target.unit}"
    bound = f"{'<=' if target.at_most else '>='} {target.need:g}{target.unit}"
    cells = [
        f"{target.beside[p]:.2f}x" if p in target.beside else MISSING for p in ("torchao", "gemlite", "limit")
    ]
    return [
        target.what,
        number,
        bound,
        target.state,
        target.where,
        *(cells if target.compared else ["", "", ""]),
    ]


def linear(data: Data) -> list[str]:
    """A table for each shape: speed over BF16 for each number of rows, and the share of the limit."""
    rows: list[Row] = [r for r in data.get("linear", {}).get("rows", []) if "seconds" in r]
    out = []
    for shape in SHAPES:
        here = {(r["name"], r["m"]): r for r in rows if tuple(r["shape"]) == shape}
        base = {m: here["BF16 F.linear", m]["seconds"] for m in ROWS if ("BF16 F.linear", m) in here}
        names = dict.fromkeys(name for name, _ in here)
        lines = []
        for name in names:
            cells = []
            for m in ROWS:
                row = here.get((name, m))
                share = f" ({row['limit'] / row['seconds']:.0%})" if row and row.get("limit") else ""
                cells.append(f"{base[m] / row['seconds']:.2f}x{share}" if row and m in base else MISSING)
            lines.append([name, *cells])
        out.append(
            f"### {shape[0]} x {shape[1]}\n\n"
            + (grid(["", *(f"M={m}" for m in ROWS)], lines) if lines else reason(data, "linear"))
        )
    absent = data.get("linear", {}).get("absent", {})
    return [*out, *(f"- {name}: {MISSING}: {why}" for name, why in absent.items())]


def checks(data: Data) -> str:
    """Every kernel against the reference on the device: largest error of all cases of a kernel and a scheme."""
    lines = []
    for row in data.get("checks", {}).get("rows", []):
        error = f"{row['error']:.1e}" if "error" in row else MISSING
        bound = f"{row['tolerance']:.1e}" if "error" in row else ""
        state = "; ".join(row["failures"])[:300] or ("ok" if row["cases"] else MISSING)
        skipped = f"; {row['skipped']} cases {MISSING}: no time or no memory" if row["skipped"] else ""
        lines.append([row["kernel"], row["scheme"], row["cases"], error, bound, state + skipped])
    return (
        grid(("kernel", "scheme", "cases", "error", "tolerance", ""), lines)
        if lines
        else reason(data, "checks")
    )


def plain(data: Data, stage: str, columns: Mapping[str, str]) -> str:
    """The rows of a stage, number by number: key -> format."""
    rows = data.get(stage, {}).get("rows", [])
    if not rows:
        return reason(data, stage)

    def cell(row: Row, key: str, form: str) -> str:
        value = row.get(key)
        return MISSING if value is None else format(value, form) if form else str(value)

    lines = [
        [
            *(cell(r, k, f) for k, f in columns.items()),
            f"{MISSING}: {r['missing']}" if r.get("missing") else "",
        ]
        for r in rows
    ]
    return grid([*columns, ""], lines)


def quantize(data: Data) -> str:
    """Every scheme, judged alone."""
    lines = []
    for row in data.get("quantize", {}).get("rows", []):
        name = row["scheme"]
        target = judge(name, BANDWIDTH, column(data, "quantize", "share", [name], 100), "%")
        why = f": {row['missing']}" if row.get("missing") else ""
        speed = f"{row['read_GBps']:.0f}" if "read_GBps" in row else MISSING
        share = MISSING if target.measured is None else f"{target.measured:.0f}%"
        lines.append([name, row.get("by", ""), speed, share, f">= {BANDWIDTH}%", target.state + why])
    columns = ("scheme", "by", "GB/s of BF16 read", "of the copy bandwidth", "target", "")
    return grid(columns, lines) if lines else reason(data, "quantize")


def limits(data: Data) -> str:
    """The measured limits of the device."""
    names = {
        "copy": ("copy on the device, read and written", 1e-9, "GB/s"),
        "host": ("pinned host memory to the device", 1e-9, "GB/s"),
        "bf16": ("16-bit matmul", 1e-12, "TFLOP/s"),
        "fp8": ("bare _scaled_mm, e4m3fn", 1e-12, "TFLOP/s"),
        "int8": ("bare _int_mm", 1e-12, "TOP/s"),
    }
    rates = data.get("limits", {})
    absent = {key: f"{MISSING}: {why}" for key, why in rates.get("absent", {}).items()}
    lines = [
        [what, f"{rates[key] * by:.1f} {unit}" if rates.get(key) else absent.get(key, reason(data, "limits"))]
        for key, (what, by, unit) in names.items()
    ]
    return grid(("limit", "measured"), lines)


def bar(y: int, label: str, value: float | None, limit: float | None = None) -> str:
    """One bar of the plot, with a mark at the limit."""
    text = f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>'
    if value is None:
        return f'{text}<text x="{LEFT + 4}" y="{y + 12}" fill="#777">{MISSING}</text>'
    shape = f'<rect x="{LEFT}" y="{y + 2}" width="{value * SCALE:.1f}" height="{LINE - 5}" fill="#4c78a8"/>'
    number = f'<text x="{LEFT + value * SCALE + 4:.1f}" y="{y + 12}">{value:.2f}x</text>'
    mark = (
        f'<rect x="{LEFT + limit * SCALE:.1f}" y="{y}" width="2" height="{LINE - 1}" fill="#e45756"/>'
        if limit
        else ""
    )
    return text + shape + number + mark


def plot(data: Data) -> str:
    """Speed over BF16 of each scheme's best kernel on the first shape, with the limit as a red mark; then decode."""
    parts, y = [], 30
    for m in ROWS:
        parts.append(f'<text x="10" y="{y + 12}" font-weight="bold">M = {m}</text>')
        y += LINE
        for scheme in dict.fromkeys(
            r["scheme"] for r in data.get("linear", {}).get("rows", []) if r.get("kind") == "ours"
        ):
            case = best(data, SHAPES[0], m, scheme)
            parts.append(bar(y, scheme, case.speed if case else None, case.limit if case else None))
            y += LINE
        if not data.get("linear", {}).get("rows"):
            parts.append(bar(y, "every scheme", None))
            y += LINE
    parts.append(f'<text x="10" y="{y + 12}" font-weight="bold">decode of one sequence, 8B shape</text>')
    y += LINE
    for row in data.get("decode", {}).get("rows", []) or [{"name": "every scheme"}]:
        parts.append(bar(y, row["name"], row.get("speed")))
        y += LINE
    title = f"Speed over BF16, {SHAPES[0][0]} x {SHAPES[0][1]}, {data.get('run', {}).get('device', MISSING)}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 10}" font-family="sans-serif" font-size="12">'
    one = (
        f'<line x1="{LEFT + SCALE}" x2="{LEFT + SCALE}" y1="24" y2="{y}" stroke="#999" stroke-dasharray="3"/>'
    )
    return "\n".join(
        [head, f'<text x="10" y="18" font-size="14">{escape(title)}</text>', one, *parts, "</svg>\n"]
    )


def render(data: Data) -> tuple[str, str]:
    """The page in Markdown and the plot as SVG, from the JSON of a run; of nothing, everything is ``not measured``."""
    run = (
        ", ".join(f"{k} {v}" for k, v in data.get("run", {}).items())
        or f"{MISSING}: no run on a GPU is committed"
    )
    parts = [
        "# GPU kernels",
        run,
        " ".join(ABOUT),
        grid(TARGETS, map(target_row, targets(data))),
        "## Limits",
        limits(data),
    ]
    parts += ["## Linear layers", "Speed over BF16 `F.linear`, and the share of the limit.", *linear(data)]
    for title, stage, table in (
        ("Quantizing a weight at load", "quantize", quantize(data)),
        ("Loading a checkpoint", "load", plain(data, "load", LOAD)),
        (
            "Decoding",
            "decode",
            plain(data, "decode", {"name": "", "kernel": "", "ms": ".3f", "speed": ".2f"}),
        ),
        ("Kernels against the reference, on the device", "checks", checks(data)),
        (
            "Bits of quantization on the device against the CPU",
            "bits",
            plain(data, "bits", {"name": "", "by": "", "state": ""}),
        ),
        (
            "Models, compiled graphs, CUDA graphs",
            "models",
            plain(data, "models", {"name": "", "found": "", "state": ""}),
        ),
    ):
        parts += [f"## {title}", noted(data, stage, table)]
    return "\n\n".join(parts) + "\n", plot(data)


def runs(folder: Path) -> dict[str, Data]:
    """The runs on GPUs whose JSON is in a folder: file name without its ending -> data."""
    results = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))
    }
    return {name: data for name, data in results.items() if data.get("kind") == "gpu"}


def index(folder: Path) -> str:
    """The page of all GPUs: the targets of each run, with its page; everything ``not measured`` where no run is."""
    gpus = runs(folder)
    if not gpus:
        return render({})[0]
    parts = ["# GPU kernels"]
    for name, data in gpus.items():
        parts += [f"## [{data['run']['device']}]({name}.md)", grid(TARGETS, map(target_row, targets(data)))]
    return "\n\n".join(parts) + "\n"
