"""``from_pretrained`` of Transformers with quantport, beside ``quantport.load`` and the quantizers of others, on a dense model and
one with experts of about 4 GB.

Each load runs in a process of its own, the cases in turn; times are medians over rounds, and the ratio is the median of those of
each round. The peak is the largest resident set (VmHWM) minus the resident set after imports: pages of files count. Must reach: the
quantized model and 512 MiB, and 1.15 times the time of ``quantport.load``. Writes ``benchmarks/results/from_pretrained.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from common import markdown, write
from load import GIB, peer, status
from load_memory import ALLOWED, dense, experts

import quantport

OURS = ("int8", "fp8_per_block", "int4_weight_only")
PEERS = ("transformers BF16", "torchao int8", "bitsandbytes 8-bit", "bitsandbytes NF4")
MODELS = {"dense": dense, "experts": experts}
EXAMPLE = Path(__file__).parents[1] / "examples" / "models" / "tiny-llama"


def load(case: str, folder: Path) -> int:
    """Loads, and returns the bytes that it planned to hold; 0 of the peers."""
    import transformers

    from quantport_transformers import QuantportConfig

    how, _, scheme = case.partition(" ")
    if how == "load":
        return quantport.load(folder, scheme, device="cpu").quantport_plan.after
    if how == "from_pretrained":
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=QuantportConfig(scheme)
        )
        return model.quantport_plan.after
    peer(case, folder, transformers)
    return 0


def child(case: str, folder: Path) -> dict[str, float]:
    load(case, EXAMPLE)  # imports and compilation are no load
    base, start = status("VmRSS"), time.perf_counter()
    final = load(case, folder)
    return {"seconds": time.perf_counter() - start, "peak": status("VmHWM") - base, "final": final}


def in_process(case: str, folder: Path) -> dict[str, float] | str:
    words = [sys.executable, __file__, "--case", case, "--dir", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    error = done.stderr.strip().splitlines()
    return json.loads(lines[-1]) if lines else (error[-1][:100] if error else f"exit {done.returncode}")


def measured(name: str, folder: Path, rounds: int, peers: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """The rows of a model, and what did not run."""
    rows, failed = list[list[str]](), list[str]()
    for scheme in OURS:
        runs = [
            [in_process(f"{how} {scheme}", folder) for how in ("from_pretrained", "load")]
            for _ in range(rounds)
        ]
        pairs = [(a, b) for a, b in runs if isinstance(a, dict) and isinstance(b, dict)]
        if len(pairs) < len(runs):
            failed.append(f"- {name}, {scheme}: {[r for r in runs if r not in pairs]}")
            continue
        print(scheme, pairs, flush=True)
        ratio, final = median(a["seconds"] / b["seconds"] for a, b in pairs), pairs[0][0]["final"]
        peaks = [median(pair[i]["peak"] for pair in pairs) for i in (0, 1)]
        rows.append(
            [
                f"{name}, {scheme}",
                f"{median(a['seconds'] for a, _ in pairs):.1f}",
                f"{ratio:.2f} {'✅' if ratio <= 1.15 else '❌'}",
                f"{final / GIB:.2f}",
                f"{peaks[0] / GIB:.2f} {'✅' if peaks[0] <= final + ALLOWED else '❌'}",
                f"{peaks[1] / GIB:.2f}",
            ]
        )
    for case in peers:
        run = in_process(case, folder)
        if isinstance(run, str):
            failed.append(f"- {name}, {case}: did not run here ({run})")
        else:
            rows.append([f"{name}, {case}", f"{run['seconds']:.1f}", "", "", f"{run['peak'] / GIB:.2f}", ""])
    return rows, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case")
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(child(args.case, args.dir)))
        return
    rows, failed, peers = list[list[str]](), list[str](), () if args.no_peers else PEERS
    for name, make in MODELS.items():
        with tempfile.TemporaryDirectory() as scratch:
            make(Path(scratch) / "model")
            print(f"{name} is written", flush=True)
            more, lost = measured(name, Path(scratch) / "model", args.rounds, peers)
            rows, failed = rows + more, failed + lost
    columns = ["", "seconds", "x quantport.load", "final GiB", "peak GiB", "peak of quantport.load"]
    notes = [
        "Must reach: peak at most the quantized model and 0.5 GiB; time at most 1.15x of quantport.load. Page cache warm, imports not timed.",
        f"{args.rounds} rounds. Peers {'did not run' if args.no_peers else 'ran once each, through Transformers too, whose mapped pages count'}.",
        *failed,
    ]
    write("from_pretrained.md", markdown("from_pretrained on the CPU", columns, rows, notes))


if __name__ == "__main__":
    main()
