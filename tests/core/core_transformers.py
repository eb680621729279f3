"""Tiny Transformers models of random weights, and their checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from core_models import same_bits, write
from torch import Tensor, nn

from quantport.modules.base import EMPTY_WEIGHT

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
TOKENS = torch.arange(3, 15).view(2, 6)


def _llava() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "projection_dim": 16}
    text = {**SIZES, "model_type": "llama", "tie_word_embeddings": True}
    return transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=95)


def _opt() -> Any:
    sizes = {
        k: v for k, v in SIZES.items() if k not in ("intermediate_size", "num_key_value_heads", "head_dim")
    }
    return transformers.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32)


def _t5(**options: Any) -> Any:
    ends = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    return transformers.T5Config(**sizes, **ends, **options)


CONFIGS: Mapping[str, tuple[str, Callable[..., Any]]] = {
    "llama": ("LlamaForCausalLM", lambda **o: transformers.LlamaConfig(**{**SIZES, **o})),
    "qwen2": ("Qwen2ForCausalLM", lambda **o: transformers.Qwen2Config(**{**SIZES, **o})),
    "gemma": ("GemmaForCausalLM", lambda **o: transformers.GemmaConfig(**{**SIZES, **o})),
    "opt": ("OPTForCausalLM", _opt),
    "llava": ("LlavaForConditionalGeneration", _llava),
    "t5": ("T5ForConditionalGeneration", _t5),
    "glm4_moe": ("Glm4MoeForCausalLM", lambda **o: transformers.Glm4MoeConfig(**{**SIZES, **EXPERTS, **o})),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        lambda **o: transformers.DeepseekV3Config(
            **{**SIZES, **EXPERTS, "num_key_value_heads": 2, "head_dim": 8},
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,  # which is head_dim
            qk_nope_head_dim=8,
            v_head_dim=16,
            **o,
        ),
    ),
}


def tiny(name: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Module:
    """A model of random weights, each of which is its own: no bias is zero, no norm is one."""
    cls, config = CONFIGS[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config(**options)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.1 + (1 if "norm" in name else 0))
    model.to(dtype)
    model.config.dtype = dtype
    model.config.architectures = [cls]
    return model


def checkpoint(folder: Path, model: nn.Module, **tensors: Tensor | None) -> Path:
    """Writes a model with its configuration as Transformers writes it: without what its class says anyway.

    Args:
        folder: Where to.
        model: From ``tiny``.
        tensors: What the file holds beside, or instead of, that of the model (``lm_head__weight``); None for
            what it does not hold.
    """
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    for name, tensor in tensors.items():
        state[name.replace("__", ".")] = tensor
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    config = model.config.to_diff_dict()
    if config.get("tie_word_embeddings") == type(model.config)().tie_word_embeddings:
        del config["tie_word_embeddings"]  # as Gemma is published
    return write(folder, state, config__json=json.dumps(config))


def of_transformers(folder: Path, dtype: Any = "auto") -> nn.Module:
    """What Transformers loads."""
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    return getattr(transformers, name).from_pretrained(folder, dtype=dtype).eval()


def kept_alike(found: nn.Module, expected: nn.Module) -> set[str]:
    """Checks that every parameter that stays has the dtype and the bits of another model; returns their
    names. The empty weights of quantized modules are none of the checkpoint.
    """
    others = dict(expected.named_parameters(remove_duplicate=False))
    names = set()
    for name, parameter in found.named_parameters(remove_duplicate=False):
        if name.endswith(EMPTY_WEIGHT):
            continue
        assert parameter.dtype is others[name].dtype, name
        assert same_bits(parameter, others[name]), name
        names.add(name)
    return names


def outputs(model: nn.Module) -> Tensor:
    """Logits for a few tokens."""
    more = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=TOKENS, **more).logits.float()


def close(found: Tensor, expected: Tensor, error: float = 0.1) -> bool:
    """Whether the relative error is small."""
    return bool((found - expected).norm() <= error * expected.norm())
