"""MoE: peak memory and time of loading a 4 GB BF16 checkpoint of experts, and the forward of one layer and of Transformers' BF16.

Loads run in turn, each in a process of its own; forward calls are interleaved in one process, and times are medians. The peak is
that of anonymous memory (RssAnon, sampled every 2 ms) minus what the process had before: file pages can be reclaimed.
Writes ``benchmarks/results/moe.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from common import markdown, write
from load import GIB, read_and_copy, status
from torch import Tensor, nn

HIDDEN, MIDDLE, EXPERTS, TOP_K = 2048, 768, 128, 8
CASES = ("read+copy", "int8", "int4_weight_only", "fp8_weight_only")
FORWARD = ("int8", "int8_weight_only", "int4_weight_only", "fp8_weight_only")
TOKENS = (1, 16, 256)
BUDGET = 512_000_000


def config(layers: int) -> dict[str, object]:
    """A Qwen3-MoE of these shapes; little beside experts."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "intermediate_size": MIDDLE,
        "moe_intermediate_size": MIDDLE,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 4096,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "max_position_embeddings": 2048,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def tensors(layers: int, fused: bool) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint: random weights, experts one by one or fused in 3-D."""
    block = torch.randn(1 << 24).mul_(0.02).bfloat16()

    def tensor(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return block.repeat(-(-count // block.numel()))[:count].view(shape)

    yield "model.embed_tokens.weight", tensor(4096, HIDDEN)
    for i in range(layers):
        p = f"model.layers.{i}."
        yield from (
            (f"{p}self_attn.{q}_proj.weight", tensor(n, HIDDEN))
            for q, n in (("q", 2048), ("k", 512), ("v", 512))
        )
        yield f"{p}self_attn.o_proj.weight", tensor(HIDDEN, 2048)
        yield from ((f"{p}self_attn.{q}_norm.weight", tensor(128)) for q in "qk")
        yield from ((f"{p}{n}_layernorm.weight", tensor(HIDDEN)) for n in ("input", "post_attention"))
        yield f"{p}mlp.gate.weight", tensor(EXPERTS, HIDDEN)
        if fused:
            yield f"{p}mlp.experts.gate_up_proj", tensor(EXPERTS, 2 * MIDDLE, HIDDEN)
            yield f"{p}mlp.experts.down_proj", tensor(EXPERTS, HIDDEN, MIDDLE)
            continue
        for e in range(EXPERTS):
            yield from (
                (f"{p}mlp.experts.{e}.{w}_proj.weight", tensor(MIDDLE, HIDDEN)) for w in ("gate", "up")
            )
            yield f"{p}mlp.experts.{e}.down_proj.weight", tensor(HIDDEN, MIDDLE)
    yield "model.norm.weight", tensor(HIDDEN)
    yield "lm_head.weight", tensor(4096, HIDDEN)


def peak_of(call: Callable[[], object]) -> tuple[object, int, float]:
    """Result, peak anonymous bytes over those before, and seconds of a call."""
    base, peak, stop = status("RssAnon"), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        result = call()
    finally:
        seconds = time.perf_counter() - start
        stop.set()
        watcher.join()
    return result, max(peak[0], status("RssAnon")) - base, seconds


def run_case(case: str, directory: Path) -> dict[str, float]:
    """Loads in this process, after what a first load imports and compiles."""
    from transformers import Qwen3MoeForCausalLM, core_model_loading  # noqa: F401

    import quantport

    if case == "read+copy":
        _, peak, seconds = peak_of(lambda: read_and_copy(directory))
        return {"seconds": seconds, "peak": peak, "final": 0}
    small = nn.ModuleDict({"a": nn.Linear(256, 256, bias=False)}).bfloat16()
    quantport.quantize_(small, case)
    model, peak, seconds = peak_of(lambda: quantport.load(directory, case, budget=BUDGET))
    assert isinstance(model, nn.Module)
    return {"seconds": seconds, "peak": peak, "final": model.quantport_plan.after}  # type: ignore[union-attr]  # a Plan


def child(case: str, directory: Path) -> dict[str, float]:
    run = [sys.executable, __file__, "--case", case, "--dir", str(directory)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{case}: {done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(lines[-1])
    return result


def loads(layers: int, rounds: int) -> tuple[list[list[object]], float]:
    """Rows of the table of loads, and the size of the checkpoint in bytes."""
    from quantport.checkpoint import save_tensors

    rows: list[list[object]] = []
    size = 0
    for fused in (False, True):
        with tempfile.TemporaryDirectory() as tmp:
            directory = Path(tmp) / "model"
            text = json.dumps(config(layers)).encode()
            save_tensors(
                directory, tensors(layers, fused), max_shard_bytes=10**9, files={"config.json": text}
            )
            size = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
            by_case: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
            for _ in range(rounds):
                for case in CASES:
                    by_case[case].append(child(case, directory))
        floor = statistics.median(r["seconds"] for r in by_case["read+copy"])
        for case, results in by_case.items():
            seconds, peak, final = (
                statistics.median(r[k] for r in results) for k in ("seconds", "peak", "final")
            )
            row = ["fused 3-D" if fused else "per expert", case, f"{seconds:.1f}", f"{seconds / floor:.2f}"]
            mark = "✅" if peak <= final + BUDGET else "❌"
            ours = [f"{final / GIB:.2f}", f"{(final + BUDGET) / GIB:.2f}", f"{peak / GIB:.2f} {mark}"]
            rows.append([*row, *(ours if final else ["", "", f"{peak / GIB:.2f}"])])
    return rows, size


def forward(rounds: int) -> list[list[object]]:
    """Rows of the table of one layer's forward."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    import quantport

    def made(implementation: str) -> nn.Module:
        settings = Qwen3MoeConfig(
            **{k: v for k, v in config(1).items() if k not in ("architectures", "dtype")}
        )
        settings._experts_implementation = implementation
        with torch.device("meta"):
            experts = Qwen3MoeExperts(settings)
        return experts.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)

    torch.manual_seed(0)
    dense = {name: made(name) for name in ("eager", "grouped_mm")}
    for p, q in zip(dense["eager"].parameters(), dense["grouped_mm"].parameters(), strict=True):
        p.copy_(torch.randn(p.shape[1:]).mul_(0.02))  # every expert the same numbers, in memory of its own
        q.data = p.data
    layers = dict(dense)
    for scheme in FORWARD:
        holder = nn.ModuleDict({"experts": made("eager")})
        for p, q in zip(holder.parameters(), dense["eager"].parameters(), strict=True):
            p.data = q.data
        quantport.quantize_(holder, scheme)
        layers[scheme] = holder["experts"]
    rows: list[list[object]] = []
    for tokens in TOKENS:
        # Several, so that a token does not always find its experts in cache.
        inputs = [_random_inputs(tokens, seed) for seed in range(7)]
        with torch.inference_mode():
            times = medians(layers, inputs, rounds)
        best = min(times["eager"], times["grouped_mm"])
        rows.append(
            [
                tokens,
                *(f"{1e3 * times[d]:.2f}" for d in dense),
                *(f"{1e3 * times[s]:.2f} ({best / times[s]:.2f}x)" for s in FORWARD),
            ]
        )
    return rows


def medians(
    layers: Mapping[str, nn.Module], inputs: Sequence[tuple[Tensor, ...]], rounds: int
) -> dict[str, float]:
    """Median seconds of a call of each, in turn in every round; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in layers}
    for i in range(rounds + 1):
        for name, layer in layers.items():
            start = time.perf_counter()
            layer(*inputs[i % len(inputs)])
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def _random_inputs(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    weights, index = torch.rand(tokens, EXPERTS, generator=random).softmax(-1).topk(TOP_K)
    return torch.randn(tokens, HIDDEN, generator=random).bfloat16(), index, weights.bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case")
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--layers", type=int, default=4, help="4 layers are 4.9 GB")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--calls", type=int, default=9, help="calls of each forward")
    parser.add_argument("--note", default="", help="what else ran meanwhile")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args.case, args.dir)))
        return
    layer = forward(args.calls)
    load, size = loads(args.layers, args.rounds)
    columns = ["checkpoint", "", "s", "x read+copy", "quantized GiB", "+ budget", "peak anonymous GiB"]
    notes = [
        f"Checkpoint of {size / 1e9:.2f} GB, page cache warm, budget {BUDGET / 1e6:.0f} MB. Must reach: peak <= quantized + budget.",
        "Imports are not timed. read+copy keeps every tensor in BF16.",
    ]
    page = markdown(f"Loading {size / 1e9:.1f} GB of BF16 experts on the CPU", columns, load, notes)
    columns = ["tokens", *(f"BF16 {d}, ms" for d in ("eager", "grouped_mm")), *(f"{s}, ms" for s in FORWARD)]
    lines = [f"## One layer: {EXPERTS} experts, top {TOP_K}, hidden {HIDDEN}, intermediate {MIDDLE}", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in layer]
    lines += [
        "",
        "Medians of interleaved calls; in brackets how many times as fast as the faster of Transformers' two.",
    ]
    write("moe.md", "\n".join([page, *lines, *([args.note] if args.note else []), ""]))


if __name__ == "__main__":
    main()
