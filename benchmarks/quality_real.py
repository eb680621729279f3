"""Quality of every scheme and option on a real model, SmolLM2-135M-Instruct, beside the text of Python's
documentation (see ``real_model.py``).

Writes ``benchmarks/results/quality_real.json``, and from it ``quality_real.md``, the table of ``docs/quality.md``
and what ``quantport plan`` says of schemes: ``core/quantport/scheme/measured_quality.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from common import RESULTS, ROOT, describe, lines_of_json
from quality import Variant, measure, pairs, row_of, variants
from quality_model import Bench, values
from quality_page import between, grid
from real_model import NAME, WHEEL, prepare
from transformers.utils import logging

WINDOWS = 24
FLATTERED = ("q4_k", "q4_k:a8")
"""What finds again the grid that the weights were rounded to before, and so says nothing of other models."""
RULES = {"floor", "even", "ceil", "rceil"}
PACKAGED = ROOT / "core" / "quantport" / "scheme" / "measured_quality.json"
PATH = RESULTS / "quality_real.json"
DOCS = ROOT / "docs" / "quality.md"
COLUMNS = ("scheme", "runs as", "bits", "class", "KL", "ppl", "top-1", "dB")
PAIRS = (
    ("int4_mse", "int4_weight_only_g32"),
    ("int4_mse", "int4_hqq"),
    ("int4_mse", "nf4"),
    ("q4_k", "int4_mse"),
    ("nvfp4:mse", "nvfp4"),
    ("nvfp4_weight_only:mse", "int4_mse"),
    ("nf4", "fp4"),
    ("nvfp4", "mxfp4"),
    ("mxfp4:mse", "mxfp4"),
    ("mxfp4_dualscale", "mxfp4"),
    ("fp8_per_block", "fp8_per_channel"),
)
"""``a``, ``b``: whose difference decides something: a default, a short name, an option that is advised."""


def todo(names: Sequence[str]) -> list[Variant]:
    """What is measured: schemes and options, and their weights under 16-bit activations, which devices fall back to.
    Peers, which store the same weights, and scale rules are judged in ``quality.py``.
    """
    own = [v for v in variants(with_peers=False)[0] if RULES.isdisjoint(v.name.split(":"))]
    known = {(v.scheme.weight, v.scheme.activation, v.scheme.rotation) for v in own}
    for v in list(own):
        fallback = v.scheme.weight_only
        if (fallback.weight, None, fallback.rotation) not in known:
            name = f"{v.name}:16"
            own.append(Variant(name, "option", fallback, partial(values, scheme=fallback), against=v.name))
    return [v for v in own if not names or v.name in names]


def run(windows: int, names: Sequence[str]) -> dict[str, Any]:
    """Measures everything: plain data for JSON."""
    start, bench, wanted = time.perf_counter(), Bench(prepare(), windows), todo(names)
    rows = {v.name: row_of(v) for v in wanted}
    kept = measure(bench, wanted, rows, NAME)
    return {
        "run": {**describe(), "minutes": str(round((time.perf_counter() - start) / 60))},
        "model": NAME,
        "wheel": WHEEL,
        "windows": windows,
        "tokens": bench.windows[:, 1:].numel(),
        "ppl": float(f"{bench.base_nll.mean().exp():.6g}"),
        "rows": list(rows.values()),
        "pairs": pairs(wanted, {NAME: kept}, PAIRS),
    }


def packaged(data: Mapping[str, Any]) -> str:
    """What the core needs to know."""
    found = {row["name"]: row["models"][NAME] for row in data["rows"] if row["name"] not in FLATTERED}
    schemes = {
        name: {
            "kl": float(f"{m['kl']:.3g}"),
            "kl_se": float(f"{m['kl_se']:.2g}"),
            "perplexity": round(math.expm1(m["dnll"]), 5),
        }
        for name, m in found.items()
    }
    head = {key: data[key] for key in ("model", "wheel", "windows", "tokens", "ppl")}
    entries = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in schemes.items())
    return json.dumps(head)[:-1] + ',\n "schemes": {\n' + entries + "\n}}\n"


def table(data: Mapping[str, Any]) -> str:
    """Every scheme and option, the least divergence first."""
    from quantport.scheme.quality import Quality

    rows = []
    for row in sorted(data["rows"], key=lambda r: r["models"][NAME]["kl"]):
        m = row["models"][NAME]
        quality = Quality(m["kl"], m["kl_se"], math.expm1(m["dnll"]), NAME)
        flattered = row["name"] in FLATTERED
        rows.append(
            (
                f"`{row['name']}`",
                row["precision"],
                f"{row['bits']:.2f}",
                "not told: see below" if flattered else quality.quality_class,
                f"{m['kl']:.4f} ± {m['kl_se']:.4f}",
                f"{math.expm1(m['dnll']):+.1%} ± {m['dnll_se']:.1%}",
                f"{m['top1']:.1%}",
                "exact" if row["name"] == "bf16" else f"{row['sqnr'][NAME]:.1f}",
            )
        )
    return grid(COLUMNS, rows)


def results(data: Mapping[str, Any]) -> str:
    """The page of results."""
    differences = [
        (
            f"`{p['a']}`",
            f"`{p['b']}`",
            f"{p['dkl']:+.4f} ± {p['dkl_se']:.4f} ({p['dkl_rel']:+.0%})",
            f"{math.expm1(p['dnll']):+.2%} ± {p['dnll_se']:.2%}",
            "no difference seen"
            if abs(p["dkl"]) <= 2 * p["dkl_se"]
            else "better"
            if p["dkl"] < 0
            else "worse",
        )
        for p in data["pairs"]
    ]
    setting = (
        f"{NAME} from `{data['wheel']}`, BF16, perplexity {data['ppl']:.2f}; {data['windows']} windows of 256 tokens "
        f"({data['tokens']} scored) of Python's documentation (`pydoc_data.topics`); ± is one standard error over "
        "windows; KL in nats per token. All arithmetic but the quantization is fp32, and so is the baseline; the row "
        "bf16 is the same model in BF16 arithmetic. `:16` leaves activations in 16 bits."
    )
    parts = (
        "# Quality of every scheme on a real model",
        ", ".join(f"{k} {v}" for k, v in data["run"].items()),
        setting,
        table(data),
        "## a against b, paired",
        grid(("a", "b", "KL of a - b", "ppl", "a is, by KL"), differences),
    )
    return "\n\n".join(parts) + "\n"


def documented(text: str, data: Mapping[str, Any]) -> str:
    """The text of ``docs/quality.md`` with its table of the real model replaced."""
    return between(text, "real", table(data))


def write_pages(data: Mapping[str, Any]) -> None:
    """Writes everything that is made from the numbers."""
    PACKAGED.write_text(packaged(data), encoding="utf-8")
    (RESULTS / "quality_real.md").write_text(results(data), encoding="utf-8")
    DOCS.write_text(documented(DOCS.read_text(encoding="utf-8"), data), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of 256 tokens")
    parser.add_argument("--only", nargs="*", default=[], help="rows to measure and print; nothing is written")
    parser.add_argument(
        "--missing", action="store_true", help="measure and add the rows that the last run lacks"
    )
    parser.add_argument("--pages", action="store_true", help="write the pages again from the last run")
    args = parser.parse_args()
    if not args.pages:
        logging.disable_progress_bar()
        before = json.loads(PATH.read_text(encoding="utf-8")) if args.missing else {"rows": []}
        measured = {row["name"] for row in before["rows"]}
        names = [v.name for v in todo([]) if v.name not in measured] if args.missing else args.only
        data = run(args.windows, names)
        if args.only:
            print(json.dumps(data, indent=1))
            return
        if args.missing:
            data = {**before, "rows": before["rows"] + data["rows"], "pairs": before["pairs"] + data["pairs"]}
        PATH.write_text(lines_of_json(data), encoding="utf-8")
    write_pages(json.loads(PATH.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
