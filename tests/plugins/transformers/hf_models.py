"""Checkpoints of tiny random models, and what ``from_pretrained`` of Transformers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from core_transformers import SIZES, checkpoint, tiny

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from quantport_transformers import QuantportConfig  # noqa: E402  # which needs both

IDS = torch.arange(3, 15).view(1, 12)
# whole blocks of FP8
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_key_value_heads": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}


def qwen3_moe(**options: Any) -> Any:
    """A model with experts, which Transformers fuses and checkpoints hold each by itself."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**{**SIZES, **MOE, "dtype": torch.bfloat16, **options})
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape) * 0.1 + (1 if "norm" in name else 0)
            parameter.copy_(values)
    return model


def save(folder: Path, kind: str, **options: Any) -> Path:
    """Writes a checkpoint in 16 bits: ``tied``, ``untied``, ``moe`` or a kind of ``core_transformers``."""
    if kind == "moe":
        qwen3_moe(**options).save_pretrained(folder, max_shard_size="20KB")
        return folder
    if kind in ("tied", "untied"):
        kind, options = "llama", {**options, "tie_word_embeddings": kind == "tied"}
    return checkpoint(folder, tiny(kind, **options))


def from_pretrained(folder: Path, *config: Any, **options: Any) -> Any:
    """Loads with Transformers; positional arguments are those of a QuantportConfig."""
    if config:
        options["quantization_config"] = QuantportConfig(*config)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits for a few tokens."""
    with torch.no_grad():
        return model(ids.to(model.device)).logits.float().cpu()
