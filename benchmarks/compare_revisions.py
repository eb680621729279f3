"""What a change costs: this tree beside an earlier revision of it, on one machine in one run.

    benchmarks/compare_revisions.py c48c99a

Each tree is measured in processes of its own, in turn, through the public interface only, so that the same code runs in both.
Numbers are medians over the processes of a tree. What a load stores is compared byte for byte: equal bytes have equal quality.
Writes ``benchmarks/results/revisions.md``.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import ROOT, interleaved, markdown, write
from torch import nn

ROOMS = ("core", *(f"backends/{room}" for room in ("cpu", "cuda", "rocm", "xpu", "npu", "triton")))
LINEAR = (
    "bf16",
    "int8",
    "int8_weight_only",
    "int4_weight_only",
    "fp8_per_block",
    "mxfp4",
    "nvfp4",
    "nf4",
    "q4_k",
)
LOADED = ("int8", "int4_weight_only", "fp8_per_tensor", "nf4")
EXPERTS = ("int8", "int4_weight_only", "fp8_weight_only")
ROWS = (1, 16, 128)
N = K = 4096
COPIES = 6  # of a layer, so that its weights are cold in cache
COMMANDS = {
    "devices": (),
    "matrix": (),
    "plan": ("headers", "--scheme", "fp8_per_block", "--device", "cuda:sm_80"),
}


def linear(public: Any) -> dict[str, float]:
    """Microseconds of a 4096x4096 layer by scheme and rows; of a layer too small to hide its dispatch, and compiled."""
    dense = nn.ModuleList(nn.Linear(K, N, bias=False, dtype=torch.bfloat16) for _ in range(COPIES))
    calls: dict[str, Any] = {}
    for scheme in LINEAR:
        layers = list(_quantized(public, dense, scheme))
        for rows in ROWS:
            x = torch.randn(rows, K, dtype=torch.bfloat16)
            calls[f"linear {scheme}, {rows} rows, us"] = lambda i, x=x, layers=layers: layers[i % COPIES](x)
    small = _quantized(
        public, nn.ModuleList([nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)]), "int4_weight_only_g32"
    )
    x, layer, compiled = (
        torch.randn(1, 128, dtype=torch.bfloat16),
        small[0],
        torch.compile(small[0], backend="aot_eager"),
    )
    calls["module call 64x128, us"] = lambda _: layer(x)
    calls["the same compiled, us"] = lambda _: compiled(x)
    return {name: 1e6 * seconds for name, seconds in interleaved(calls, rounds=5, seconds=0.04).items()}


def _quantized(public: Any, dense: nn.ModuleList, scheme: str) -> nn.ModuleList:
    copied = copy.deepcopy(dense)
    public.quantize_(copied, scheme)
    return copied


def loads(public: Any, folder: Path) -> dict[str, float]:
    """Seconds of a load of 0.9 GB by scheme, and of a layer of experts, whose forward is in milliseconds. Each is loaded three times
    from pages that were just read: neither the disk nor a kernel's first use is a load."""
    public.load(folder / "tiny", "int8", device="cpu")  # imports are not a load either
    numbers = {
        f"load {scheme}, s per GB": _median_load(public, folder / "dense", scheme)[0] / 0.9
        for scheme in LOADED
    }
    calls: dict[str, Any] = {}
    for scheme in EXPERTS:
        numbers[f"load experts {scheme}, s"], model = _median_load(public, folder / "experts", scheme)
        layer = model.model.layers[0].mlp
        for tokens in (1, 16, 256):
            x = torch.randn(1, tokens, 2048, dtype=torch.bfloat16)
            calls[f"experts {scheme}, {tokens} tokens, ms"] = lambda _, x=x, layer=layer: layer(x)
    numbers |= {name: 1e3 * seconds for name, seconds in interleaved(calls, rounds=5, seconds=0.04).items()}
    model = public.load(folder / "tiny", config={"scheme": "int8", "kv_cache_dtype": "fp8"}, device="cpu")
    ids = torch.ones(1, 8, dtype=torch.long)
    step = {
        "generate 32 tokens with a KV cache of fp8, ms": lambda _: model.generate(
            ids, max_new_tokens=32, min_new_tokens=32
        )
    }
    numbers |= {name: 1e3 * seconds for name, seconds in interleaved(step, rounds=3).items()}
    return numbers | {
        "peak memory of all loads, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    }


def _median_load(public: Any, folder: Path, scheme: str) -> tuple[float, Any]:
    times, model = [], None
    for _ in range(3):
        model = None
        for file in folder.glob("*.safetensors"):
            file.read_bytes()
        start = time.perf_counter()
        model = public.load(folder, scheme, device="cpu")
        times.append(time.perf_counter() - start)
    return statistics.median(times), model


def digests(public: Any, folder: Path) -> dict[str, str]:
    """A digest of the tensors that a load stores, by scheme; whatever their names are."""
    stored = {}
    for scheme in public.schemes:
        model = public.load(folder / "tiny-llama", scheme, device="cpu")
        tensors = (t.contiguous().view(-1).view(torch.uint8).numpy() for t in model.state_dict().values())
        each = sorted(hashlib.sha256(content).hexdigest() for content in tensors)
        stored[scheme] = hashlib.sha256("".join(each).encode()).hexdigest()
    return stored


@torch.no_grad()
def measure(part: str, folder: Path) -> dict[str, Any]:
    """One part, in this process, of the tree that it imports."""
    public = importlib.import_module("quantport")
    torch.manual_seed(0)
    parts: dict[str, Any] = {"linear": lambda: linear(public), "loads": lambda: loads(public, folder)}
    return {"tree": public.__file__} | (parts | {"digests": lambda: digests(public, folder)})[part]()


def run(tree: Path, part: str, folder: Path) -> dict[str, Any]:
    """One part in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", part, "--folder", str(folder)],
        env=environment(tree),
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    numbers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    imported = Path(numbers.pop("tree"))
    assert imported.is_relative_to(tree), imported
    return numbers


def environment(tree: Path) -> dict[str, str]:
    """Imports come from the tree, compiled code from a cache of its own."""
    path = os.pathsep.join(str(tree / room) for room in ROOMS)
    return os.environ | {"PYTHONPATH": path, "QUANTPORT_CACHE_DIR": str(tree.parent / f"cache-{tree.name}")}


def commands(tree: Path, folder: Path) -> dict[str, float]:
    """Milliseconds of processor time of each command past the import of torch."""
    base = _processor_time([sys.executable, "-c", "import torch"], tree, folder)
    return {
        f"quantport {name}, ms past torch": 1e3
        * (_processor_time([sys.executable, "-m", "quantport", name, *arguments], tree, folder) - base)
        for name, arguments in COMMANDS.items()
    }


def _processor_time(command: list[str], tree: Path, folder: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment(tree), cwd=folder, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def checkpoints(folder: Path) -> None:
    """A dense model of 0.9 GB, a layer of 128 experts, a tiny model, and the headers of a model of 671B parameters."""
    from load import make
    from moe import config, tensors

    from quantport.checkpoint import save_tensors

    make(folder / "dense", layers=1)
    save_tensors(folder / "experts", tensors(1, False), files={"config.json": json.dumps(config(1)).encode()})
    (folder / "tiny").symlink_to(ROOT / "examples" / "models" / "tiny-qwen3-moe")
    (folder / "tiny-llama").symlink_to(ROOT / "examples" / "models" / "tiny-llama")
    headers(folder / "headers")


def headers(folder: Path) -> None:
    """Shards that end right after their header: 61 layers of the shapes of DeepSeek-V3."""
    folder.mkdir()
    index = {}
    for i in range(61):
        file, header, at = f"model-{i:05d}.safetensors", {}, 0
        for name, shape in _deepseek_layer(i):
            index[name], end = file, at + 2 * math.prod(shape)
            header[name], at = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}, end
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def _deepseek_layer(i: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, layer = 7168, f"model.layers.{i}"
    attention = {"q_a": (1536, hidden), "q_b": (24576, 1536), "kv_b": (32768, 512), "o": (hidden, 16384)}
    yield from ((f"{layer}.self_attn.{name}_proj.weight", shape) for name, shape in attention.items())
    blocks = (
        {"mlp": 18432}
        if i < 3
        else {"mlp.shared_experts": 2048} | {f"mlp.experts.{e}": 2048 for e in range(256)}
    )
    for block, width in blocks.items():
        yield f"{layer}.{block}.gate_proj.weight", (width, hidden)
        yield f"{layer}.{block}.up_proj.weight", (width, hidden)
        yield f"{layer}.{block}.down_proj.weight", (hidden, width)


def compare(revision: str, rounds: int, folder: Path) -> str:
    """The page."""
    earlier = folder / "earlier"
    earlier.mkdir()
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    subprocess.run(["tar", "x"], cwd=earlier, check=True, input=archive.stdout)
    trees = {revision: earlier, "this": ROOT}
    checkpoints(folder)
    old, new = (run(tree, "digests", folder) for tree in trees.values())
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for _ in range(rounds):
        for name, tree in trees.items():
            runs[name].append(
                run(tree, "linear", folder) | run(tree, "loads", folder) | commands(tree, folder)
            )
    before, after = (
        {key: statistics.median(r[key] for r in each) for key in each[0]} for each in runs.values()
    )
    rows = [
        [key, f"{before[key]:.4g}", f"{after[key]:.4g}", f"{after[key] / before[key]:.2f}"] for key in before
    ]
    differ = sorted(scheme for scheme in old if new.get(scheme) != old[scheme])
    said = f"What a load stores: {len(old) - len(differ)} of {len(old)} schemes are equal byte for byte" + (
        f"; not {', '.join(differ)}." if differ else "."
    )
    return markdown(
        f"This tree beside revision {revision}",
        ["", revision, "this", "ratio"],
        rows,
        [said, f"Medians of {rounds} processes of each, in turn."],
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("revision", nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write("revisions.md", compare(options.revision, options.rounds, Path(folder)))


if __name__ == "__main__":
    main()
