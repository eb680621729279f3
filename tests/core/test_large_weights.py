"""One weight, and an embedding that stays, as large as the budget: loading, saving, taking over and
quantizing into a directory stay within it, measured in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from core_models import write

CHILD = """
import gc, sys, threading, torch, quantport
from pathlib import Path
from torch import nn
from quantport.loading import quantize_checkpoint

folder, out, scheme, budget = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
N, K = int(sys.argv[5]), int(sys.argv[6])

def anonymous():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024

def peak_of(call):
    gc.collect()
    base, peak, stop = anonymous(), [0], threading.Event()
    def watch():
        while not stop.wait(0.001):
            peak[0] = max(peak[0], anonymous())
    watcher = threading.Thread(target=watch, daemon=True)  # of a load that fails too
    watcher.start()
    made = call()
    stop.set()
    watcher.join()
    return made, peak[0] - base

def factory():
    return nn.ModuleDict({"a": nn.Linear(K, N, bias=False), "embed_tokens": nn.Embedding(N, K)})

def load(path, *scheme):
    return quantport.load(path, *scheme, model=factory, budget=budget, workers=1)

small = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False)}).bfloat16()
quantport.quantize_(small, scheme)  # what is imported and compiled on the first call is not the stream
quantport.save(small, out / "warm")
model, peak = peak_of(lambda: load(folder, scheme))
final = sum(t.nbytes for t in (*model.buffers(), *model.parameters()))
print("load", peak, final + budget)
_, peak = peak_of(lambda: quantport.save(model, out / "saved"))
print("save", peak, budget)
del model
model, peak = peak_of(lambda: load(out / "saved"))
print("take over", peak, final + budget)
del model
_, peak = peak_of(
    lambda: quantize_checkpoint(folder, out / "streamed", scheme, model=factory, budget=budget, workers=1)
)
print("quantize", peak, budget)
for file in (out / "saved").iterdir():
    assert file.read_bytes() == (out / "streamed" / file.name).read_bytes(), file
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("scheme", "n", "k"),
    [
        ("int8", 4096, 8192),
        ("int4_g32", 4096, 8192),
        pytest.param("fp8_per_tensor", 8192, 16384, marks=pytest.mark.slow),
        pytest.param("nvfp4", 8192, 16384, marks=pytest.mark.slow),
        pytest.param("int4_weight_only", 8192, 16384, marks=pytest.mark.slow),
        pytest.param("q4_k", 8192, 8192, marks=pytest.mark.slow),
    ],
)
def test_the_whole_way(tmp_path, scheme, n, k):
    row = torch.randn(k).mul_(0.02).bfloat16()
    both = row.expand(n, k)
    folder = write(tmp_path / "c", {"a.weight": both, "embed_tokens.weight": both})
    budget = 90 << 20  # the weight has 67 or 268 MB in BF16
    run = [sys.executable, "-c", CHILD, str(folder), str(tmp_path), scheme, str(budget), str(n), str(k)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = [line.rsplit(maxsplit=2) for line in done.stdout.splitlines()]
    assert [what for what, _, _ in measured] == ["load", "save", "take over", "quantize"]
    for what, peak, most in measured:
        assert int(peak) <= int(most), (what, int(peak) / 2**20, int(most) / 2**20)
    assert int(measured[0][1]) > 0.9 * (int(measured[0][2]) - budget), "the sampler sees the model"
