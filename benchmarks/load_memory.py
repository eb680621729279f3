"""Peak memory of loading, of saving and of quantizing into a directory, for models of about 4 GB of every kind; and what is
planned for Llama-3.1-405B.

Each case runs in a process of its own. The peak is the largest resident set of a step (VmHWM, which is reset before it) minus
the resident set before anything was loaded: mapped pages of the checkpoint count. Must reach: what is quantized and 0.5 GiB.
Writes ``benchmarks/results/load_memory.md``.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import moe
import torch
from common import markdown, write
from load import GIB, make, shapes, status

import quantport
from quantport.checkpoint import save_tensors
from quantport.loading.executor import give_back

SCHEMES = ("int8", "int4_mse", "fp8_per_tensor", "q4_k")
LARGE = ("int8", "int4_mse", "fp8_per_tensor", "fp8_per_block", "nvfp4", "q4_k")
ALLOWED = GIB // 2


def dense(folder: Path) -> None:
    make(folder, layers=9)


def half(folder: Path) -> None:
    make(folder, layers=9, dtype=torch.float16)


def single(folder: Path) -> None:
    make(folder, layers=4, dtype=torch.float32)


def vocabulary(folder: Path) -> None:
    make(folder, layers=1, vocab=256_000)


def experts(folder: Path) -> None:
    files = {"config.json": json.dumps(moe.config(3)).encode()}
    save_tensors(folder, moe.tensors(3, False), max_shard_bytes=10**9, files=files)


CASES: dict[str, Callable[[Path], None]] = {
    "dense, BF16": dense,
    "dense, FP16": half,
    "dense, FP32": single,
    "vocabulary of 256,000": vocabulary,
    "384 experts": experts,
}


def peak_of(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call returns, and the most bytes that were resident meanwhile."""
    gc.collect()
    give_back()  # what the step before has freed is none of this one
    Path("/proc/self/clear_refs").write_text("5")
    result = call()
    return result, status("VmHWM")


def child(folder: Path, scheme: str) -> dict[str, int]:
    """All steps, in this process."""
    from quantport.loading import quantize_checkpoint

    examples = Path(__file__).parents[1] / "examples" / "models"
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        # imports and compilation are no load
        quantport.save(quantport.load(examples / "tiny-llama", scheme), Path(scratch) / "small")
        base = status("VmRSS")
        model, loading = peak_of(lambda: quantport.load(folder, scheme))
        final = model.quantport_plan.after
        saving = peak_of(partial(quantport.save, model, Path(scratch) / "saved"))[1]
        del model
        again = peak_of(lambda: quantport.load(Path(scratch) / "saved"))[1]  # the model is let go of
        streamed = peak_of(lambda: quantize_checkpoint(folder, Path(scratch) / "streamed", scheme))[1]
    peaks = {"loading": loading, "saving": saving, "loading what was saved": again, "quantizing": streamed}
    return {"final": final, **{step: peak - base for step, peak in peaks.items()}}


def llama_405b(folder: Path) -> None:
    """Headers alone: shards that end where the tensors would begin."""
    folder.mkdir()
    index = {}
    for number, (name, shape) in enumerate(_of_405b()):
        file, size = f"model-{number:05d}.safetensors", 2 * math.prod(shape)
        index[name] = file
        text = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def _of_405b() -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, middle, heads = 16384, 53248, 1024
    for name, shape in shapes(126, 128256).items():
        new = (hidden,) if len(shape) == 1 else (shape[0], hidden)
        leaf = name.split(".")[-2]
        known = {"gate_proj": (middle, hidden), "up_proj": (middle, hidden), "down_proj": (hidden, middle)}
        square = {"q_proj": (hidden, hidden), "o_proj": (hidden, hidden)}
        narrow = {"k_proj": (heads, hidden), "v_proj": (heads, hidden)}
        yield name, {**known, **square, **narrow}.get(leaf, new)


def measured(schemes: list[str]) -> list[list[str]]:
    rows = []
    for case, fill in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            fill(folder)
            size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
            for scheme in schemes:
                command = [sys.executable, __file__, "--child", scheme, "--folder", str(folder)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                final = found.pop("final")
                over = {step: peak - (0 if step == "quantizing" else final) for step, peak in found.items()}
                rows.append(
                    [
                        f"{case} ({size / 1e9:.1f} GB)",
                        scheme,
                        f"{final / GIB:.2f}",
                        *(f"{o / GIB:.2f} {'✅' if o <= ALLOWED else '❌'}" for o in over.values()),
                    ]
                )
                print(rows[-1], flush=True)
    return rows


def planned() -> list[list[str]]:
    with tempfile.TemporaryDirectory() as scratch:
        llama_405b(folder := Path(scratch) / "model")
        rows = []
        for scheme in LARGE:
            plan = quantport.plan(folder, scheme)
            mark = "✅" if plan.budget <= ALLOWED else "❌"
            cells = (plan.before / GIB, plan.after / GIB)
            rows.append([scheme, *(f"{c:.1f}" for c in cells), f"{plan.budget / GIB:.2f} {mark}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.folder, options.child)))
        return
    steps = ("loading", "saving", "loading what was saved", "quantizing")
    columns = ("model", "scheme", "quantized GiB", *(f"{s}: GiB beside it" for s in steps))
    large = ("scheme", "BF16 GiB", "quantized GiB", "GiB beside it while loading")
    head = "| " + " | ".join(large) + " |\n|" + "---|" * len(large)
    table = "\n".join("| " + " | ".join(row) + " |" for row in planned())
    notes = [
        "Quantizing into a directory (`quantport quantize`) keeps no model: its column is the whole of it.",
        "",
        "## Planned for Llama-3.1-405B, from headers alone",
        "",
        f"{head}\n{table}",
    ]
    title = "Memory beside the quantized model"
    write("load_memory.md", markdown(title, columns, measured(options.schemes), notes))


if __name__ == "__main__":
    main()
