"""What is saved as GGUF, loaded by llama.cpp itself: ``make llama`` builds it, and names its Python here."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from core_models import DENSE, MODELS, MOE

import quantport

PYTHON = os.environ.get("QUANTPORT_LLAMA", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="no llama.cpp: `make llama` builds it"),
]
WORKER = Path(__file__).with_name("llama_worker.py")
TEXT = (MODELS / "eval.txt").read_text(encoding="utf-8")[:300]
COUNT = 16
BLOCKS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")


def of_llama(file: Path, ids: list[int]) -> dict[str, Any]:
    """Tokens of the text, logits ``[ids, vocabulary]`` and the greedy answer of a file."""
    asked = json.dumps({"file": str(file), "text": TEXT, "ids": ids, "count": COUNT})
    done = subprocess.run([PYTHON, str(WORKER)], input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("source", [DENSE, MOE], ids=lambda path: path.name)
@pytest.mark.parametrize("scheme", BLOCKS)
def test_llama_cpp_answers_alike(source: Path, scheme: str, tmp_path: Path) -> None:
    """It rounds activations to eight bits, and keys and values to fp16: that is what its logits are away."""
    targets = dict.fromkeys(("model.embed_tokens", "lm_head"), "q8_0")
    config: dict[str, Any] = {"linear": scheme, "moe": scheme, "targets": targets}
    if scheme.endswith("_k"):  # some columns are no multiple of 256
        config["moe"] = "q8_0"
        targets |= {"*.mlp.down_proj": "q8_0"} if source == DENSE else {}
    model = quantport.load(source, config=config, device="cpu", dtype=torch.float32)
    file = quantport.save(model, tmp_path / "model.gguf", format="gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    ids = tokenizer(TEXT).input_ids
    theirs = of_llama(file, ids)
    assert theirs["tokens"] == ids
    assert (theirs["bos"], theirs["eos"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    with torch.no_grad():
        ours = model(torch.tensor([ids + theirs["greedy"]])).logits[0]
    answered = ours[len(ids) - 1 : -1]
    ours, logits = ours[: len(ids)], torch.tensor(theirs["logits"])
    assert (logits - ours).norm() < 0.01 * ours.norm()
    assert (logits.argmax(-1) == ours.argmax(-1)).float().mean() >= 0.95
    # where two tokens are as likely as each other, each may take another
    taken = answered.gather(1, torch.tensor(theirs["greedy"])[:, None])[:, 0]
    assert (answered.amax(-1) - taken).max() < 0.1
