"""Quality of every scheme on both example models: perplexity, KL divergence, top-1 agreement, bytes.

Writes ``benchmarks/results/quality.md``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from common import ROOT, markdown, write
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import quantport
from quantport.cli import comparing
from quantport.host import host

MODELS = ("tiny-llama", "tiny-qwen3-moe")
BOUND = {"int8": 1.01, "int4_weight_only_g32": 1.06}


class Recorded:
    """The baseline's logits, computed once and given again for each scheme."""

    def __init__(self, model: Any, windows: torch.Tensor) -> None:
        with torch.no_grad():
            self.logits = {tuple(w.tolist()): model(w[None]).logits for w in windows}

    def __call__(self, ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.logits[tuple(ids[0].tolist())])


def measure(name: str, rows: list[list[object]]) -> None:
    """Adds the rows of one model: each scheme as this device runs it, and W8A8 schemes also by the exact reference."""
    path = ROOT / "examples" / "models" / name
    text = (path.parent / "eval.txt").read_text(encoding="utf-8")
    windows = comparing.cut(AutoTokenizer.from_pretrained(path)(text, verbose=False).input_ids, 64, None)
    base = Recorded(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval(), windows)
    for scheme in host().schemes.values():
        for fallback in ("weight_only", "reference") if scheme.activation and scheme.name != "int8" else ("weight_only",):
            if scheme.name == "bf16":
                continue
            model = quantport.load(path, scheme.name, fallback=fallback)
            q = comparing.quality(model, base, windows, lambda *_: None)
            plan = model.quantport_plan
            effective = plan.quantized[0].choice.precision
            ratio = q["perplexity"] / q["perplexity_bf16"]
            mark = "" if scheme.name not in BOUND else " ✅" if ratio <= BOUND[scheme.name] else " ❌"
            rows.append([
                name, scheme.name, f"{effective} {plan.quantized[0].choice.kernel}", f"{q['perplexity_bf16']:.3f}", f"{q['perplexity']:.3f}",
                f"{ratio - 1:+.2%}{mark}", f"{q['kl']:.5f}", f"{q['top1']:.1%}", f"{plan.after / 1e6:.2f}", f"{plan.after / plan.before:.0%}",
            ])  # fmt: skip


def main() -> None:
    logging.disable_progress_bar()
    rows: list[list[object]] = []
    for name in MODELS:
        measure(name, rows)
    columns = ["model", "scheme", "runs as", "ppl BF16", "ppl", "change", "KL, nats", "top-1", "MB", "of BF16"]
    notes = [
        "Held-out text examples/models/eval.txt in 64 windows of 256 tokens. Must reach: int8 within 1%, int4 in groups of 32 within 6%.",
        "W8A8 FP8 schemes run twice: as the device falls back (W8A16), and by the exact reference (activations quantized too).",
    ]
    write("quality.md", markdown("Quality of every scheme on the example models", columns, rows, notes))


if __name__ == "__main__":
    main()
