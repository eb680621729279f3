"""Quality of every scheme, its options, and peers' implementations on the same weights.

Writes ``benchmarks/results/quality.json``, and from it ``quality.md``, ``quality.svg`` and the table of ``docs/quality.md``.
Peers come with ``pip install '.[bench]'`` (and ``hqq``); those that are missing are named and left out.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from common import ROOT, describe, lines_of_json
from quality_model import Answers, Bench, values
from quality_page import write_pages
from torch import Tensor
from transformers.utils import logging

from quantport.numerics import rotate
from quantport.scheme import Scheme
from quantport.scheme.catalog import BUILTIN

MODELS = ("tiny-llama", "tiny-qwen3-moe")
WINDOWS = 16
RULES = ("floor", "even", "ceil", "rceil", "mse")
BIG = 4096  # bits per weight are those of a large matrix
OPTIONS = (
    "nvfp4:mse",
    "nvfp4_weight_only:mse",
    "mxfp4_w4a8:mse",
    "nf4:double",
    "fp4:double",
    "mxfp4_dualscale:floor",
    "mxfp4_dualscale:even",
    "q4_0:a8",
    "q8_0:a8",
    "q4_k:a8",
    "q5_k:a8",
    "q6_k:a8",
)
PAIRS = (
    ("mxfp4_dualscale", "mxfp4"),
    ("mxfp4_dualscale", "mxfp4:mse"),
    ("mxfp4_dualscale:16", "mxfp4_weight_only"),
    ("mxfp4_dualscale:floor:16", "mxfp4_weight_only:floor"),
    ("mxfp4_dualscale:16", "mxfp4_dualscale:floor:16"),
    ("mxfp4_dualscale:16", "mxfp4_weight_only:mse"),
    ("nvfp4", "mxfp4"),
    ("nvfp4:mse", "mxfp4"),
    ("int4_mse", "int4_hqq"),
    ("int4_mse", "int4_weight_only_g32"),
    ("int4_mse", "rtn_offset_g64"),
    ("int4_hqq", "rtn_offset_g64"),
)

Values = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """One row: a name, the scheme that says its activations, rotation and bits, and what it makes of a weight."""

    name: str
    kind: str
    scheme: Scheme
    values: Values
    against: str = ""
    bits: float | None = None


def rtn_offset(weight: Tensor) -> Tensor:
    """Plain rounding with an offset: minimum and maximum of each 64 weights, scale and offset in BF16. What int4_mse must beat."""
    n, k = weight.shape
    wide = torch.nn.functional.pad(weight.float(), (0, -k % 64), mode="replicate").view(n, -1, 64)
    low, high = wide.amin(-1, keepdim=True).bfloat16().float(), wide.amax(-1, keepdim=True)
    scale = ((high - low) / 15).bfloat16().float()
    scale = torch.where(scale == 0, 1.0, scale)
    return (((wide - low) / scale).round().clamp(0, 15) * scale + low).view(n, -1)[:, :k].contiguous()


def variants(with_peers: bool = True) -> tuple[list[Variant], list[str]]:
    """Every row to measure, and the peers that are not installed."""

    def of(scheme: Scheme, kind: str, name: str = "", against: str = "") -> Variant:
        return Variant(name or scheme.name, kind, scheme, lambda w: values(w, scheme), against)

    out = [of(s, "scheme") for s in BUILTIN.values()]
    for base in ("mxfp4", "mxfp4_weight_only", "mxfp8", "mxfp8_weight_only"):
        out += [
            of(BUILTIN[f"{base}:{r}"], "option", against=base) for r in RULES if r in BUILTIN[base].options
        ]
    out += [of(BUILTIN[name], "option", against=name.partition(":")[0]) for name in OPTIONS]
    out += [
        of(s.option("hadamard"), "option", against=s.name)
        for s in BUILTIN.values()
        if "hadamard" in s.options
    ]
    for name in ("mxfp4_dualscale", "mxfp4_dualscale:floor"):
        out.append(of(BUILTIN[name].weight_only, "option", f"{name}:16"))
    if not with_peers:
        return out, []
    out.append(Variant("rtn_offset_g64", "peer", BUILTIN["int4_mse"], rtn_offset, "int4_mse"))
    from quality_peers import peers  # libraries that take seconds to import

    installed, missing = peers()
    out += [Variant(p.name, "peer", BUILTIN[p.scheme], p.values, p.scheme, p.bits) for p in installed]
    return out, missing


def synthetic() -> dict[str, Tensor]:
    """Three weights ``[256, 4096]`` with the same seed at every run: Gaussian, Student t (5 degrees), 1% outlier columns x 20."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(256, 4096, generator=g)
    chi2 = torch.randn(5, 256, 4096, generator=g).square().sum(0)
    heavy = torch.randn(256, 4096, generator=g) / (chi2 / 5).sqrt()
    columns = torch.where(torch.rand(4096, generator=g) < 0.01, 20.0, 1.0)
    return {
        name: (w * 0.02).bfloat16()
        for name, w in (("gauss", normal), ("t5", heavy), ("outlier", normal * columns))
    }


def sqnr(weight: Tensor, quantized: Tensor) -> float:
    """Signal to quantization noise, dB; 120 where there is no noise."""
    noise = (weight.double() - quantized.double()).square().sum()
    return float(10 * torch.log10(weight.double().square().sum() / noise)) if noise > 0 else 120.0


def weight_db(v: Variant, weight: Tensor, quantized: Tensor) -> float:
    """SQNR of one weight; a rotation is undone first."""
    return sqnr(weight, rotate(quantized, v.scheme.rotation) if v.kind != "peer" else quantized)


def mean(x: Tensor) -> tuple[float, float]:
    """Mean over tokens, and its standard error from the means of the windows, which are independent where tokens are not."""
    per = x.mean(1)
    return float(f"{per.mean():.6g}"), float(f"{per.std() / math.sqrt(len(per)):.3g}")


def summary(answers: Answers, base: Tensor) -> dict[str, float]:
    """Numbers of one model under one variant; ``dnll`` is paired with the baseline, token by token."""
    dnll, dnll_se = mean(answers.nll - base)
    kl, kl_se = mean(answers.kl)
    ppl = float(f"{answers.nll.mean().exp():.6g}")
    top1 = round(answers.same.double().mean().item(), 4)
    return {"ppl": ppl, "dnll": dnll, "dnll_se": dnll_se, "kl": kl, "kl_se": kl_se, "top1": top1}


def difference(a: Answers, b: Answers) -> dict[str, float]:
    """Paired a - b: positive means that a is worse."""
    (kl, kl_se), (nll, nll_se) = mean(a.kl - b.kl), mean(a.nll - b.nll)
    return {
        "dkl": kl,
        "dkl_se": kl_se,
        "dkl_rel": round(kl / b.kl.mean().item(), 4),
        "dnll": nll,
        "dnll_se": nll_se,
    }


def equal(a: Tensor, b: Tensor) -> float:
    """Share of values that are equal up to the last bits of fp32 (an order of multiplications)."""
    return ((a - b).abs() <= 2.0**-20 * b.abs()).double().mean().item()


def measure(
    bench: Bench, todo: list[Variant], rows: dict[str, dict[str, Any]], name: str
) -> dict[str, Answers]:
    """Adds the numbers of one model to every row; peers whose weights equal ours share our answers."""
    kept: dict[str, Answers] = {}
    cache: dict[str, dict[tuple[str, str], Tensor]] = {}
    base = bench.base_nll
    for v in todo:
        start = time.perf_counter()
        weights = {key: v.values(w) for key, w in bench.weights.items()}
        row = rows[v.name]
        row["sqnr"][name] = round(
            sum(weight_db(v, w, weights[k]) for k, w in bench.weights.items()) / len(weights), 3
        )
        sizes = [(v.scheme.bytes(*w.shape), w.numel()) for w in bench.weights.values()]
        row["bits_in"][name] = round(8 * sum(s for s, _ in sizes) / sum(n for _, n in sizes), 3)
        same = (
            v.kind == "peer"
            and v.against in cache
            and [equal(weights[k], cache[v.against][k]) for k in weights]
        )
        row["equal"] = round(min(row.get("equal", 1.0), sum(same) / len(same)), 5) if same else None
        whole = bool(same) and min(same) == 1.0
        kept[v.name] = (
            kept[v.against] if whole else bench.bf16() if v.name == "bf16" else bench.run(weights, v.scheme)
        )
        row["models"][name] = summary(kept[v.name], base)
        if any(v.name == other.against for other in todo if other.kind == "peer"):
            cache[v.name] = weights
        print(
            f"{name} {v.name}: KL {row['models'][name]['kl']:.5f} in {time.perf_counter() - start:.1f} s",
            flush=True,
        )
    return kept


def pairs(
    todo: list[Variant], kept: Mapping[str, Mapping[str, Answers]], named: Iterable[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Paired differences: options and peers against what they vary, and the pairs that are named."""
    wanted = dict.fromkeys([*((v.name, v.against) for v in todo if v.against), *named])
    return [
        {"a": a, "b": b, "model": m, **difference(by[a], by[b])}
        for a, b in wanted
        for m, by in kept.items()
        if a in by and b in by
    ]


def row_of(v: Variant) -> dict[str, Any]:
    """The row of a variant before any model has run."""
    bits = v.bits or 8 * v.scheme.bytes(BIG, BIG) / BIG**2
    row = {"name": v.name, "kind": v.kind, "against": v.against, "precision": v.scheme.precision}
    return {**row, "bits": round(bits, 4), "sqnr": {}, "bits_in": {}, "models": {}}


def run(windows: int, names: list[str]) -> dict[str, Any]:
    """Measures everything: plain data for JSON."""
    todo, missing = variants()
    todo = [v for v in todo if not names or v.name in names]
    rows, drawn = {v.name: row_of(v) for v in todo}, synthetic()
    for v in todo:
        rows[v.name]["sqnr"] = {kind: round(weight_db(v, w, v.values(w)), 3) for kind, w in drawn.items()}
    kept = {}
    for name in MODELS:
        bench = Bench(ROOT / "examples" / "models" / name, windows)
        kept[name] = measure(bench, todo, rows, name)
    return {
        "run": describe(),
        "windows": windows,
        "tokens": bench.windows[:, 1:].numel(),
        "missing": missing,
        "rows": list(rows.values()),
        "pairs": pairs(todo, kept, PAIRS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of 256 tokens, for each model")
    parser.add_argument("--only", nargs="*", default=[], help="rows to measure and print; nothing is written")
    parser.add_argument(
        "--pages", action="store_true", help="write the pages again from the JSON of the last run"
    )
    args = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / "quality.json"
    if not args.pages:
        logging.disable_progress_bar()
        data = run(args.windows, args.only)
        if args.only:
            print(json.dumps(data["rows"], indent=1))
            return
        path.write_text(lines_of_json(data), encoding="utf-8")
    write_pages(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
