"""Pages of the quality benchmark, all from the JSON of one run: results page, plot, and the table of ``docs/quality.md``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs" / "quality.md"
WEIGHTS = ("gauss", "t5", "outlier")
COLUMNS = (
    "scheme",
    "runs as",
    "bits",
    "dB Gauss",
    "dB t5",
    "dB outliers",
    "dB real",
    "KL llama",
    "KL moe",
    "ppl llama",
    "ppl moe",
    "top-1",
    "peers",
)

Row = Mapping[str, Any]
Pair = Mapping[str, Any]


def grid(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    columns = list(columns)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def kl(row: Row) -> float:
    """Mean divergence over the models, nats."""
    return mean(m["kl"] for m in row["models"].values())


def ordered(data: Mapping[str, Any]) -> list[Row]:
    """Schemes, each followed by its options."""
    rows = data["rows"]
    base = [r for r in rows if r["kind"] == "scheme"]
    return [
        r
        for b in base
        for r in (b, *(o for o in rows if o["kind"] == "option" and o["name"].partition(":")[0] == b["name"]))
    ]


def pair(data: Mapping[str, Any], a: str, b: str) -> list[Pair]:
    """The paired differences a - b, one for each model."""
    return [p for p in data["pairs"] if (p["a"], p["b"]) == (a, b)]


def combined(pairs: list[Pair], key: str) -> tuple[float, float]:
    """Mean of a paired difference over the models, and its standard error."""
    return mean(p[key] for p in pairs), math.hypot(*(p[f"{key}_se"] for p in pairs)) / len(pairs)


def peer_cell(data: Mapping[str, Any], row: Row) -> str:
    """How the peers of a scheme compare with it, in words."""
    lines = []
    for peer in (
        r
        for r in data["rows"]
        if r["kind"] == "peer" and r["against"] == row["name"] and r["name"] != "rtn_offset_g64"
    ):
        if peer["equal"] == 1.0:
            lines.append(f"{peer['name']}: equal")
        else:
            d, se = combined(pair(data, peer["name"], row["name"]), "dkl")
            lines.append(f"{peer['name']}: KL {d / kl(row):+.0%} ± {se / kl(row):.0%}")
    return "; ".join(lines)


def cells(data: Mapping[str, Any], row: Row) -> list[str]:
    """One row of the table."""
    models = list(row["models"].values())
    real = mean(v for k, v in row["sqnr"].items() if k not in WEIGHTS)
    exact = row["name"].startswith("bf16")
    db = [f"{v:.1f}" if not exact else "exact" for v in (*(row["sqnr"][w] for w in WEIGHTS), real)]
    divergence = [f"{1000 * m['kl']:.2f} ± {1000 * m['kl_se']:.2f}" for m in models]
    ppl = [f"{math.expm1(m['dnll']):+.2%} ± {m['dnll_se']:.2%}" for m in models]
    top = " / ".join(f"{m['top1']:.1%}" for m in models)
    return [
        f"`{row['name']}`",
        row["precision"],
        f"{row['bits']:.2f}",
        *db,
        *divergence,
        *ppl,
        top,
        peer_cell(data, row),
    ]


def table(data: Mapping[str, Any]) -> str:
    """The table of schemes and options."""
    return grid(COLUMNS, (cells(data, r) for r in ordered(data) if not r["name"].endswith(":16")))


def checks(data: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """What must hold: (claim, found, holds)."""
    rows = {r["name"]: r for r in data["rows"]}
    out = []
    for a, b, least in (
        ("int4_mse", "rtn_offset_g64", 0.7),
        ("nvfp4:mse", "nvfp4", 1.0),
        ("nvfp4:mse", "mxfp4", 1.0),
        ("mxfp4_dualscale", "mxfp4", 0.0),
    ):
        gain = {k: rows[a]["sqnr"][k] - rows[b]["sqnr"][k] for k in rows[a]["sqnr"]}
        judged = [v for k, v in gain.items() if k == "gauss" or k not in WEIGHTS]
        result = ", ".join(f"{k} {v:+.2f}" for k, v in gain.items())
        out.append(
            (f"`{a}` at least {least} dB over `{b}`, Gaussian and real weights", result, min(judged) >= least)
        )
    for row in data["rows"]:
        if row["kind"] != "peer" or row["name"] == "rtn_offset_g64":
            continue
        pairs = pair(data, row["name"], row["against"])
        d, se = combined(pairs, "dnll")
        result = (
            "equal weights"
            if row["equal"] == 1.0
            else f"perplexity of the peer {math.expm1(d):+.2%} ± {se:.2%}"
        )
        out.append((f"`{row['against']}` not worse than {row['name']}", result, d >= -2 * se))
    return out


def pair_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """Paired differences: relative KL and perplexity of a against b, with standard errors; ``better`` beyond two of them."""
    out = []
    for a, b in dict.fromkeys((p["a"], p["b"]) for p in data["pairs"]):
        pairs = pair(data, a, b)
        line = [f"`{a}`", f"`{b}`"]
        for p in pairs:
            base = p["dkl"] / p["dkl_rel"] if p["dkl_rel"] else 1.0
            line += [
                f"{p['dkl_rel']:+.1%} ± {abs(p['dkl_se'] / base):.1%}",
                f"{math.expm1(p['dnll']):+.2%} ± {p['dnll_se']:.2%}",
            ]
        d, se = combined(pairs, "dkl")
        same = d == se == 0
        seen = abs(d) > 2 * se and max(abs(p["dkl_rel"]) for p in pairs) > 1e-3
        out.append(
            [*line, "equal" if same else "no difference seen" if not seen else "better" if d < 0 else "worse"]
        )
    return out


def results(data: Mapping[str, Any]) -> str:
    """The page of results."""
    run = ", ".join(f"{k} {v}" for k, v in data["run"].items())
    names = list(data["rows"][0]["models"])
    setting = (
        f"{data['windows']} windows of 256 tokens ({data['tokens']} scored) of examples/models/eval.txt for each model; "
        "± is one standard error over windows; KL in thousandths of a nat. All arithmetic but the quantization is fp32, and so is the "
        "baseline; the row bf16 is the same model in BF16 arithmetic. `:16` leaves activations in 16 bits."
    )
    peers = [cells(data, r)[:-1] for r in data["rows"] if r["kind"] == "peer"]
    options = grid(
        ("a", "b", *(f"{what} {n}" for n in names for what in ("KL", "ppl")), "a is, by KL"), pair_rows(data)
    )
    held = grid(
        ("must hold", "found", ""),
        ((claim, result, "✅" if ok else "❌") for claim, result, ok in checks(data)),
    )
    missing = ", ".join(data["missing"]) or "none"
    parts = (
        "# Quality of every scheme",
        run,
        setting,
        held,
        "## Schemes and options",
        grid(COLUMNS, (cells(data, r) for r in ordered(data))),
        "## Peers on the same weights",
        f"Not installed: {missing}.",
        grid(COLUMNS[:-1], peers),
        "## a against b, paired",
        options,
    )
    return "\n\n".join(parts) + "\n"


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Bits per weight against the mean divergence of both models."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "quantport", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9.5, 6.5))
    extra = ("nvfp4_weight_only:mse", "nf4:double")
    shown = [r for r in data["rows"] if (r["kind"] == "scheme" or r["name"] in extra) and r["name"] != "bf16"]
    for row in shown:
        weight_only = row["precision"].endswith("A16")
        axes.plot(
            row["bits"],
            1000 * kl(row),
            "o",
            color="C0" if weight_only else "C1",
            mfc="C0" if weight_only else "none",
        )
    for low, high, x, align in (
        (0, 4.4, 4.05, "right"),
        (4.4, 6, 4.7, "left"),
        (6, 7, 6.7, "left"),
        (7, 17, 8.65, "left"),
    ):
        last = 0.0  # labels of a column stand above each other, 17% apart at least
        for row in sorted((r for r in shown if low <= r["bits"] < high), key=kl):
            last = max(1000 * kl(row), last * 1.17)
            axes.annotate(
                row["name"],
                (row["bits"], 1000 * kl(row)),
                xytext=(x if row["bits"] < 5 or row["bits"] > 6 else 5.6, last),
                ha=align,
                va="center",
                fontsize=7,
                arrowprops={"arrowstyle": "-", "lw": 0.3, "color": "grey"},
            )
    axes.set_xlim(2.9, 10.2)
    axes.set(
        yscale="log",
        xlabel="bits per weight, scales included (4096 x 4096)",
        ylabel="KL to BF16, thousandths of a nat, mean of both models",
    )
    axes.plot([], [], "o", color="C0", label="16-bit activations")
    axes.plot([], [], "o", color="C1", mfc="none", label="activations quantized too")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def documented(text: str, data: Mapping[str, Any]) -> str:
    """The text of ``docs/quality.md`` with its table replaced."""
    return between(text, "table", table(data))


def between(text: str, name: str, new: str) -> str:
    """The text with what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` replaced."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{new}\n{end}{rest.partition(end)[2]}"


def write_pages(data: Mapping[str, Any]) -> None:
    """Writes everything."""
    (RESULTS / "quality.md").write_text(results(data), encoding="utf-8")
    plot(data, RESULTS / "quality.svg")
    DOCS.write_text(documented(DOCS.read_text(encoding="utf-8"), data), encoding="utf-8")
