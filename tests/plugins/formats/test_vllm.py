"""What is written, loaded by vLLM on a CPU, in the environment of ``ci/loaders``; in the nightly run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from core_models import DENSE

import quantport

ROOT = Path(__file__).parents[3]
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
TOKENS = [1 + 37 * i % 2000 for i in range(40)]
SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
WIDE = torch.backends.cpu.get_cpu_capability().startswith("AVX512")

needs_vllm = pytest.mark.skipif(not VLLM.exists(), reason=f"no {VLLM}: ci/loaders makes it")
needs_avx512 = pytest.mark.skipif(not WIDE, reason="no AVX-512, which vLLM's int4 of the CPU is built for")


def probabilities(logits):
    """The log-probability of each token after the first."""
    return logits[0, :-1].float().log_softmax(-1).gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]


INT4 = [
    ("compressed-tensors", "int4_weight_only:g64"),
    ("gptq", "int4_weight_only:g64:fp16"),
    ("awq", "int4_weight_only:g64:fp16"),
]


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scheme", "dtype", "limit"),
    [
        # without VNNI its int8 adds products in pairs that saturate at 16 bits: 0.033, and 0.002 beside sums
        # that saturate so
        ("compressed-tensors", "int8", torch.float32, 0.06),
        ("compressed-tensors", "fp8_per_channel", torch.float32, 0.02),  # 0.008
        ("modelopt", "fp8_per_channel", torch.bfloat16, 0.05),  # which it wants; 0.026
        *(pytest.param(*case, torch.bfloat16, 0.03, marks=needs_avx512) for case in INT4),
    ],
)
def test_vllm_gives_the_same_probabilities(name, scheme, dtype, limit, tmp_path):
    model = quantport.load(DENSE, scheme, dtype=dtype, device="cpu", fallback="reference")
    with pytest.warns(UserWarning, match="fallback='reference' is not written"):
        quantport.save(model, tmp_path / "model", format=name)
    with torch.no_grad():
        ours = probabilities(model(torch.tensor([TOKENS])).logits)
    out, tokens = tmp_path / "out.json", tmp_path / "tokens.json"
    tokens.write_text(json.dumps(TOKENS), encoding="utf-8")
    script = Path(__file__).with_name("of_vllm.py")
    done = subprocess.run(
        [VLLM, script, out, tokens, tmp_path / "model", str(dtype).removeprefix("torch.")],
        env={**os.environ, **SETTINGS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    theirs = torch.tensor(json.loads(out.read_text(encoding="utf-8")))
    assert (theirs - ours).abs().mean() < limit
