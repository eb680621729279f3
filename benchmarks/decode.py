"""Whole models decode one sequence: load time, prefill of 512, decode of 64 and peak memory of every scheme, beside Transformers in
16 and 32 bits, other libraries, llama.cpp over the same weights, and the limit.

Each contender runs in a process of its own, some of them beside the reference at a time; their prompts and bursts of tokens alternate,
and ratios are medians over the bursts. Writes the section of each model in ``benchmarks/results/decode.md``. Contenders that need
another environment than this one get it by ``--python llama.cpp=PATH``; one that does not run is named in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, describe, interleaved, write
from decode_contenders import COMPILED, PEERS
from decode_models import MODELS, prepare, write_gguf

QUICK = {
    "models": ["llama-1.1b", "smollm2-135m"],
    "schemes": [
        "int8",
        f"int8{COMPILED}",
        "int4_w4a8",
        "int4_weight_only",
        "q4_k",
        "q4_k:a8",
        "fp8_weight_only",
    ],
    "peers": [
        "Transformers BF16",
        "Transformers FP32",
        "llama.cpp Q8_0",
        "llama.cpp Q4_0",
        "llama.cpp Q4_K_M",
    ],
}
COMPARED_WITH = {  # llama.cpp's at as many bits, with int8 activations as it has
    "llama.cpp Q8_0": ("int8", "q8_0:a8"),
    "llama.cpp Q4_0": ("int4_w4a8", "q4_0:a8"),
    "llama.cpp Q4_K_M": ("q4_k", "q4_k:a8"),
}
COLUMNS = ("", "load, s", "prefill, tok/s", "x", "decode, tok/s", "x", "of the limit", "peak GiB")
TITLE = "# Decoding whole models on the CPU"
TIMEOUT = 300  # seconds that a contender may take to answer


class Child:
    """A contender that runs, and what it said after loading: ``load`` seconds, ``peak`` bytes, and ``read`` bytes for a token.

    Raises:
        RuntimeError: it did not load; the text says why.
    """

    def __init__(self, name: str, python: str, arguments: Sequence[object]) -> None:
        self.name, self.errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        script = Path(__file__).with_name("decode_contenders.py")
        self.process = subprocess.Popen(
            [python, str(script), name, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            bufsize=1,
        )
        self.loaded = self.answer()

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        while select.select([self.process.stdout], [], [], TIMEOUT)[0]:
            line = self.process.stdout.readline()
            if line.startswith("{"):
                return dict(json.loads(line))
            if not line:
                break
        self.close()
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        raise RuntimeError(
            (lines or [f"exit {self.process.returncode}, or no answer in {TIMEOUT} s"])[-1][:160]
        )

    def stage(self) -> float:
        """Seconds of the next stage: the prompt, or a burst of tokens."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        return self.answer()["seconds"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Result:
    """Seconds of the stages of one contender beside those of the reference, round by round."""

    def __init__(self, loaded: Mapping[str, float], prompt: int, burst: int) -> None:
        self.loaded, self.sizes = loaded, (prompt, burst)
        self.pairs: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])

    def rate(self, stage: int) -> float:
        """Tokens per second, of prefill (0) or decode (1)."""
        return self.sizes[stage] / statistics.median(own for own, _ in self.pairs[stage])

    def ratio(self, stage: int) -> float:
        """How many times as fast as the reference."""
        return statistics.median(reference / own for own, reference in self.pairs[stage])


def measure(
    names: Sequence[str], reference: str, start: Any, args: argparse.Namespace
) -> tuple[dict[str, Result], dict[str, str]]:
    """Runs contenders beside the reference, ``args.together`` at a time; returns their results, and why others did not run."""
    results: dict[str, Result] = {}
    failed: dict[str, str] = {}
    first = start(reference)
    rest = [name for name in names if name != reference]
    for i in range(0, max(1, len(rest)), args.together):
        group = {reference: first}
        for name in rest[i : i + args.together]:
            try:
                group[name] = start(name)
            except RuntimeError as error:
                failed[name] = str(error)
        for name, child in group.items():
            results.setdefault(name, Result(child.loaded, args.prompt, args.burst))
        for _ in range(args.rounds):
            for stage in range(1 + args.tokens // args.burst):
                run_stage(group, reference, min(stage, 1), results, failed)
        for name, child in group.items():
            if name != reference:
                child.close()
    first.close()
    return {name: results[name] for name in names if name in results and name not in failed}, failed


def run_stage(
    group: dict[str, Child], reference: str, kind: int, results: dict[str, Result], failed: dict[str, str]
) -> None:
    """One stage of every contender of a group, in turn."""
    base = group[reference].stage()
    for name in list(group):
        try:
            own = base if name == reference else group[name].stage()
        except RuntimeError as error:
            failed[name] = str(error)
            del group[name]
            continue
        results[name].pairs[kind].append((own, base))


def read_speed() -> float:
    """Bytes a second that all threads read from memory."""
    buffer = torch.ones(1 << 28)
    return buffer.nbytes / interleaved({"read": lambda _: buffer.sum()})["read"]


def section(
    model: str, results: Mapping[str, Result], failed: Mapping[str, str], args: argparse.Namespace
) -> Iterator[str]:
    """The lines of one model."""
    speed = read_speed()
    yield from (f"## {model}: {MODELS[model]}", "", ", ".join(f"{k} {v}" for k, v in describe().items()), "")
    yield from ("| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS))
    for name, result in results.items():
        read = result.loaded["read"]
        cells = [name, f"{result.loaded['load']:.1f}"]
        for stage in (0, 1):
            cells += [f"{result.rate(stage):.1f}", f"{result.ratio(stage):.2f}"]
        cells += [
            f"{read * result.rate(1) / speed:.0%}" if read else "",
            f"{result.loaded['peak'] / 2**30:.2f}",
        ]
        yield "| " + " | ".join(cells) + " |"
    for name, why in failed.items():
        yield f"| {name} | did not run here: {why.replace('|', '/')} |" + " |" * (len(COLUMNS) - 2)
    yield from ("", f"Limit: reading the weights of a token once, at the measured {speed / 1e9:.1f} GB/s.")
    yield f"Prompt of {args.prompt}, {args.tokens} tokens in bursts of {args.burst}, {args.rounds} rounds."
    for peer, schemes in COMPARED_WITH.items():
        for name in (each + end for each in schemes for end in ("", COMPILED)):
            if peer in results and name in results:
                yield f"- {name} beside {peer}: " + beside(results[name], results[peer])
    yield ""


def beside(own: Result, peer: Result) -> str:
    """Prefill and decode as ratios to a peer, each by way of the reference; 1.0 must be reached."""
    ratios = [own.ratio(stage) / peer.ratio(stage) for stage in (0, 1)]
    return ", ".join(
        f"{kind} {ratio:.2f}x {'✅' if ratio >= 1 else '❌'}"
        for kind, ratio in zip(("prefill", "decode"), ratios, strict=True)
    )


def page(model: str, lines: Iterator[str], reference: str) -> str:
    """The page with the section of one model replaced."""
    path = RESULTS / "decode.md"
    old = path.read_text(encoding="utf-8").split("\n## ")[1:] if path.exists() else []
    sections = {text.partition(":")[0]: f"## {text.strip()}\n" for text in old}
    sections[model] = "\n".join(lines)
    notes = (
        "Times of contenders that alternate burst by burst, each in its own process, as medians; `x`: over the reference, which is the",
        f"first row here ({reference}). Loading is not timed with imports, nor with what the first call compiles; peak: the largest",
        "resident set after them, file pages that stay mapped included. `compiled`: a static cache and one compiled step",
        "(`quantport.compile_decode`; of a peer Transformers' own). onnxruntime: only the products of a step, since it has no such model.",
    )
    ordered = [sections[name] for name in MODELS if name in sections]
    return "\n".join([TITLE, "", *notes, "", *ordered])


def contenders(args: argparse.Namespace, reference: str) -> list[str]:
    """Names in the order of the table: the reference, peers, schemes; those that are compared near each other."""
    from quantport.plugins.registry import default_registry

    every = [*default_registry().schemes, *(f"{name}:a8" for name in ("q8_0", "q4_0", "q4_k", "q6_k"))]
    chosen = (
        args.schemes
        if args.schemes is not None
        else [*every, f"int8{COMPILED}", f"int4_weight_only{COMPILED}"]
    )
    peers = args.peers if args.peers is not None else list(PEERS)
    return list(dict.fromkeys([reference, *peers, *chosen]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--schemes", nargs="*", help=f"of ours; with '{COMPILED}' after it: compiled")
    parser.add_argument("--peers", nargs="*", choices=PEERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--burst", type=int, default=16, help="tokens of a contender until the next has its turn"
    )
    parser.add_argument("--together", type=int, default=3, help="contenders in memory beside the reference")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where models are made, and kept")
    parser.add_argument(
        "--python", action="append", default=[], metavar="LIBRARY=PATH", help="the Python of a library"
    )
    parser.add_argument("--quick", action="store_true", help="fewer of all, in 10 minutes")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.tokens = 2, 32
        for key, names in QUICK.items():
            setattr(args, key, getattr(args, key) if getattr(args, key) is not None else names)
    return args


def main() -> None:
    from quantport_cpu.kernels.base import has_bf16_dots

    args = arguments()
    pythons = dict(entry.split("=", 1) for entry in args.python)
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    reference = "Transformers BF16" if has_bf16_dots() else "Transformers FP32"
    with tempfile.TemporaryDirectory() as tmp:
        for model in args.models or MODELS:
            try:
                directory = prepare(model, args.folder or Path(tmp))
            except subprocess.CalledProcessError as error:
                print(f"{model}: cannot be had here: {error}", file=sys.stderr)
                continue
            gguf = (args.folder or Path(tmp)) / f"{model}.gguf"
            if not gguf.exists() and any(
                name.startswith("llama.cpp") for name in contenders(args, reference)
            ):
                write_gguf(directory, gguf)
            shared = (directory, gguf, args.prompt, args.tokens, args.burst, args.threads)

            def start(name: str, shared: Sequence[object] = shared) -> Child:
                return Child(name, pythons.get(name.partition(" ")[0], sys.executable), shared)

            results, failed = measure(contenders(args, reference), reference, start, args)
            write("decode.md", page(model, section(model, results, failed, args), reference))


if __name__ == "__main__":
    main()
