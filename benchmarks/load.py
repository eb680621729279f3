"""Peak memory and wall time of loading and quantizing a 4 GB sharded BF16 checkpoint, of a mere read and copy, and of peers.

Each case runs in a process of its own, the cases in turn; times are medians over rounds. The peak is the largest resident set
(VmHWM) minus the resident set after imports. Writes ``benchmarks/results/load.md``; with ``--small`` only its line on a model of
5,000 small layers.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import RESULTS, describe, markdown, write

HIDDEN, MIDDLE, VOCAB = 4096, 11008, 32000
GIB = 1 << 30
SMALL = "Small layers, 64 x 64: "  # begins their line of the page
CASES = ("read+copy", "int8", "int4_weight_only", "fp8_per_tensor", "fp8_per_channel", "fp8_per_block")
PEERS = (
    "transformers BF16",
    "torchao int8",
    "torchao fp8",
    "quanto int8",
    "bitsandbytes 8-bit",
    "bitsandbytes NF4",
)


def shapes(layers: int, vocab: int = VOCAB) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a Llama-shaped model."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    for i in range(layers):
        p = f"model.layers.{i}."
        out |= {f"{p}self_attn.{q}_proj.weight": (HIDDEN, HIDDEN) for q in "qkvo"}
        out |= {f"{p}mlp.{m}_proj.weight": (MIDDLE, HIDDEN) for m in ("gate", "up")}
        out |= {f"{p}mlp.down_proj.weight": (HIDDEN, MIDDLE)}
        out |= {f"{p}{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    return out | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocab, HIDDEN)}


def make(directory: Path, layers: int, vocab: int = VOCAB, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes the checkpoint: random weights, shards of about 1 GB, an index and a config."""
    from quantport.checkpoint import save_tensors

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MIDDLE,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
        "max_position_embeddings": 2048,
    }
    block = torch.randn(1 << 24).mul_(0.02).to(dtype)

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        count = 1
        for d in shape:
            count *= d
        return block.repeat(-(-count // block.numel()))[:count].view(shape)

    stream = ((name, tensor(shape)) for name, shape in shapes(layers, vocab).items())
    save_tensors(directory, stream, max_shard_bytes=10**9, files={"config.json": json.dumps(config).encode()})


def status(key: str) -> int:
    """Bytes of one line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def read_and_copy(directory: Path) -> None:
    """The lower bound: reads and copies every tensor once on all cores, and releases its pages."""
    from quantport.checkpoint import Checkpoint
    from quantport.loading.executor import Task, run_tasks

    kept = []
    with Checkpoint.open(directory) as checkpoint:

        def copy(name: str) -> None:
            kept.append(checkpoint.read(name).clone())
            checkpoint.release(name)

        run_tasks([Task(n, t.nbytes, lambda n=n: copy(n)) for n, t in checkpoint.tensors.items()])  # type: ignore[misc]  # a default


def run_case(case: str, directory: Path) -> dict[str, float]:
    """Runs one case in this process."""
    import transformers
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, core_model_loading  # noqa: F401 - their import is not a load

    import quantport
    from quantport.plugins.registry import default_registry

    default_registry()
    warm(case, directory)
    base, start = status("VmRSS"), time.perf_counter()
    final = 0
    if case == "read+copy":
        read_and_copy(directory)
    elif case in default_registry().schemes:
        final = quantport.load(directory, case).quantport_plan.after
    else:
        peer(case, directory, transformers)
    return {"seconds": time.perf_counter() - start, "peak": status("VmHWM") - base, "final": final}


def warm(case: str, directory: Path) -> None:
    """Loads a small model, so that lazy imports and compilation are not measured."""
    import quantport
    from quantport.plugins.registry import default_registry

    if case in default_registry().schemes:
        with tempfile.TemporaryDirectory() as tmp:
            from quantport.checkpoint import save_tensors

            small = torch.nn.Linear(256, 256, bias=False)
            save_tensors(Path(tmp) / "m", [("a.weight", torch.randn(256, 256).bfloat16())])
            quantport.load(Path(tmp) / "m", case, model=lambda: torch.nn.ModuleDict({"a": small}))


def peer(case: str, directory: Path, transformers: object) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

    if case == "transformers BF16":
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        return
    if case.startswith("torchao"):
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig() if "int8" in case else Float8WeightOnlyConfig())
    elif case.startswith("quanto"):
        config = QuantoConfig(weights="int8")
    else:
        config = (
            BitsAndBytesConfig(load_in_8bit=True)
            if "8-bit" in case
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        )
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, quantization_config=config)


def small_layers(count: int, rounds: int = 9) -> str:
    """CPU time of all threads that loading many small layers takes over building their modules, in a line of the page."""
    import quantport
    from quantport.checkpoint import save_tensors
    from quantport.loading.build_context import building

    def make() -> torch.nn.Module:
        layers = (torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for _ in range(count))
        return torch.nn.ModuleDict({f"l{i}": layer for i, layer in enumerate(layers)})

    def build() -> object:
        with building():
            return make()

    weights = ((f"l{i}.weight", torch.randn(64, 64).bfloat16()) for i in range(count))
    with tempfile.TemporaryDirectory() as tmp:
        folder = save_tensors(Path(tmp) / "m", weights)
        calls = (lambda: quantport.load(folder, "int8", model=make), build)
        taken = [[cpu_seconds(call) for call in calls] for _ in range(rounds + 1)][1:]  # the first compiles
    load, built = map(min, zip(*taken, strict=True))
    mark, run = "✅" if load - built <= 1 else "❌", describe()
    return (
        f"{SMALL}{load - built:.2f} s of CPU time over the {built:.2f} s of building {count:,} of them in `int8`, all threads, "
        f"least of {rounds} {mark} (must reach: 1 s; {run['device']}, {run['date']}, commit {run['commit']})."
    )


def cpu_seconds(call: Callable[[], object]) -> float:
    gc.collect()
    start = time.process_time()
    made = call()
    seconds = time.process_time() - start
    del made
    return seconds


def child(case: str, directory: Path) -> dict[str, float] | str:
    code = subprocess.run(
        [sys.executable, __file__, "--case", case, "--dir", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in code.stdout.splitlines() if line.startswith("{")]
    error = code.stderr.strip().splitlines()
    return json.loads(lines[-1]) if lines else (error[-1][:100] if error else f"exit {code.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case")
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--layers", type=int, default=9, help="9 layers are 4.1 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--small", action="store_true", help="only the line on small layers")
    args = parser.parse_args()
    if args.small:
        page = (RESULTS / "load.md").read_text(encoding="utf-8").splitlines()
        kept = [line for line in page if not line.startswith(SMALL)]
        write("load.md", "\n".join([*kept, small_layers(5000), ""]))
        return
    if args.case:
        print(json.dumps(run_case(args.case, args.dir)))
        return
    with tempfile.TemporaryDirectory() as tmp:
        directory = args.dir or Path(tmp) / "model"
        if not directory.exists():
            make(directory, args.layers)
        size = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
        cases = CASES if args.no_peers else CASES + PEERS
        results: dict[str, list[dict[str, float]]] = {c: [] for c in cases}
        failed: dict[str, str] = {}
        for r in range(args.rounds):
            for case in cases:
                if case not in failed and (r == 0 or case in CASES):
                    result = child(case, directory)
                    if isinstance(result, str):
                        failed[case] = result
                    else:
                        results[case].append(result)
    report(results, failed, size)


def report(by_case: dict[str, list[dict[str, float]]], failed: dict[str, str], size: int) -> None:
    floor = statistics.median(r["seconds"] for r in by_case["read+copy"])
    rows = []
    for case, results in by_case.items():
        if not results:
            continue
        seconds, peak = (statistics.median(r[k] for r in results) for k in ("seconds", "peak"))
        final = results[0]["final"]
        ours = case in CASES and case != "read+copy"
        bound = max(1.25 * final, final + 512 * (1 << 20))
        marks = (
            (("✅" if seconds <= 1.5 * floor else "❌"), ("✅" if peak <= bound else "❌"))
            if ours
            else ("", "")
        )
        rows.append(
            [
                case,
                f"{seconds / (size / 1e9):.2f}",
                f"{seconds / floor:.2f} {marks[0]}",
                f"{final / GIB:.2f}" if ours else "",
                f"{peak / GIB:.2f} {marks[1]}",
                f"{peak / final:.2f}" if ours else "",
            ]
        )
    columns = ["", "s per GB of BF16", "x read+copy", "final GiB", "peak GiB", "peak / final"]
    notes = [
        f"Checkpoint of {size / 1e9:.2f} GB, page cache warm. Must reach: at most 1.5x of read+copy; peak at most quantized + 25% or + 512 MiB.",
        "Imports are not timed. Peers ran once each; they load through Transformers, which keeps file pages mapped (they count as resident here, as for ours).",
        *(f"- {case}: did not run here ({why})" for case, why in failed.items()),
        small_layers(5000),
    ]
    write("load.md", markdown("Loading a 4 GB BF16 checkpoint on the CPU", columns, rows, notes))


if __name__ == "__main__":
    main()
