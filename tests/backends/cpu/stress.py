"""Loads every scheme in fresh processes, three loads of eight workers beside a thread that builds models, and
compares every byte.

    python tests/backends/cpu/stress.py --processes 50

Half of the processes find an empty cache of machine code, half that of the one before. Each has another order
of schemes, so that each scheme is the first in some. What they must store comes from the reference, in a
process without compiled code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

import quantport
from quantport.checkpoint import save_tensors
from quantport.scheme.catalog import BUILTIN

SHAPES = ((320, 512), (200, 320), (64, 200), (512, 64), (129, 512), (640, 129), (256, 640), (48, 256))


def names(options: bool) -> list[str]:
    """Every scheme, and with each of its options but the rotation, which is applied before."""
    schemes = [s for s in BUILTIN.values() if s.name != "bf16"]
    return [
        s.name
        for s in (*schemes, *(s.option(o) for s in schemes for o in s.options if options and o != "hadamard"))
    ]


def model() -> nn.Module:
    """Linear layers of odd and even shapes."""
    layers = [nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device="cpu") for n, k in SHAPES]
    return nn.Sequential(*layers)


def checkpoint(folder: Path) -> None:
    """Writes the 16-bit model."""
    torch.manual_seed(0)
    save_tensors(folder, iter(model().state_dict().items()), max_shard_bytes=1 << 20, files={})


def digest(folder: Path, scheme: str, workers: int) -> str:
    """A digest of what a load stores, in the layout of the scheme."""
    loaded = quantport.load(folder, scheme, model=model, device="cpu", workers=workers)
    content = hashlib.sha256()
    for name, tensor in sorted(loaded.state_dict().items()):
        content.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def build_models(started: threading.Event, stop: threading.Event) -> int:
    """Builds models of Transformers, which change the default dtype of the whole process meanwhile;
    how many.
    """
    built = 0
    try:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=128,
        )
        while not stop.is_set():
            LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
            built += 1
            started.set()
    finally:
        started.set()
    return built


def child(folder: Path, seed: int, workers: int, build: bool, options: bool) -> None:
    """Prints what each scheme stores, as JSON."""
    order, started, stop = names(options), threading.Event(), threading.Event()
    random.Random(seed).shuffle(order)
    if build:
        sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(1) as beside:
        building = beside.submit(build_models, started, stop) if build else None
        try:
            if build:
                started.wait()
            with ThreadPoolExecutor(3 if build else 1) as loads:  # several at once
                found = dict(
                    zip(order, loads.map(lambda scheme: digest(folder, scheme, workers), order), strict=True)
                )
        finally:
            stop.set()
    if building is not None and building.result() == 0:
        raise RuntimeError("no model was built meanwhile")
    print(json.dumps(found))


def fresh(folder: Path, seed: int, options: bool, **environment: str) -> tuple[int, dict[str, str], str]:
    """Exit status, digests and standard error of a fresh process."""
    reference = "NUMBA_DISABLE_JIT" in environment
    call = [
        sys.executable,
        __file__,
        "--child",
        str(folder),
        "--seed",
        str(seed),
        "--workers",
        "1" if reference else "8",
    ]
    call += ["--options"] if options else []
    done = subprocess.run(
        call + ([] if reference else ["--build"]),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines and not done.returncode else {}, done.stderr


def run(processes: int, options: bool = True, **environment: str) -> list[str]:
    """Findings of so many processes."""
    findings = []
    with tempfile.TemporaryDirectory() as place:
        folder, cache = Path(place) / "model", Path(place) / "cache"
        checkpoint(folder)
        code, expected, stderr = fresh(folder, 0, options, NUMBA_DISABLE_JIT="1")
        assert code == 0, stderr
        assert expected, stderr  # every scheme that a fresh process knows
        for i in range(processes):
            if i % 2 == 0:
                shutil.rmtree(cache, ignore_errors=True)
            code, found, stderr = fresh(folder, i, options, QUANTPORT_CACHE_DIR=str(cache), **environment)
            wrong = [scheme for scheme in expected if found.get(scheme) != expected[scheme]]
            if code or wrong:
                findings.append(f"process {i}: status {code}, other bytes for {wrong}: {stderr[-500:]}")
            print(
                f"process {i}: status {code}, {len(wrong)} of {len(expected)} schemes differ",
                file=sys.stderr,
                flush=True,
            )
    return findings


def main() -> None:
    """Runs many processes, or is one of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=50)
    parser.add_argument("--child", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--options", action="store_true")
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.seed, options.workers, options.build, options.options)
    findings = run(options.processes)
    print(
        "\n".join(findings)
        or f"{options.processes} processes, {len(names(options=True))} schemes each: no byte differs, "
        "none aborted"
    )
    raise SystemExit(bool(findings))


if __name__ == "__main__":
    main()
