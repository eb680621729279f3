"""The bundled dense model keeps its perplexity: int8 within 1%, int4 in groups of 32 within 6%."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import quantport
from quantport.cli import comparing

MODELS = Path(__file__).parents[2] / "examples" / "models"


@pytest.mark.parametrize(("scheme", "bound"), [("int8", 1.01), ("int4_weight_only_g32", 1.06)])
def test_perplexity(scheme, bound):
    logging.disable_progress_bar()
    path = MODELS / "tiny-llama"
    ids = AutoTokenizer.from_pretrained(path)((MODELS / "eval.txt").read_text(encoding="utf-8"), verbose=False).input_ids
    windows = comparing.cut(ids, 8, None)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    found = comparing.quality(quantport.load(path, scheme), base, windows, lambda *_: None)
    assert found["perplexity_bf16"] < 120, "the model knows its text"
    assert found["perplexity"] <= bound * found["perplexity_bf16"]
    assert 0 < found["kl"] < 0.05
