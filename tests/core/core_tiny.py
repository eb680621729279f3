"""Tiny random models of the installed Transformers: one table of sizes, by all the names for them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from quantport.loading.build_context import building

VOCABULARY, TOKENS, IMAGE = 64, 12, 32
LIMIT = 4_000_000  # weights of a tiny model
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "decoder_hidden_size"), 32),
    **dict.fromkeys(("embedding_size", "projection_dim", "word_embed_proj_dim", "out_channels"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "ffn_hidden_size", "n_inner"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "shared_intermediate_size"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "expert_ffn_hidden_size", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "mamba_n_groups"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "attention_head_size", "global_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "type_vocab_size"), VOCABULARY),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 1),
    "pad_token_id": 0,
    "eos_token_id": 2,
    "sliding_window": 8,
    "image_size": IMAGE,
    "patch_size": 8,
    "num_channels": 3,
    "num_mel_bins": 8,
    "mamba_d_head": 8,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "mamba_expand": 2,
    "expand": 2,
}


def tiny_config(cls: type, own: dict[str, Any] | None = None) -> Any:
    """A configuration of a class with the sizes above under the names that it has, and what is its own."""
    own = deepcopy(own or {})
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]  # a dataclass
    sizes = {name: size for name, size in SIZES.items() if name in known}
    for name, part in (getattr(cls, "sub_configs", None) or {}).items():
        if isinstance(own.get(name), dict):
            kind = own[name].pop("model_type", None)
            own[name] = tiny_config(transformers.CONFIG_MAPPING[kind] if kind else part, own[name])
        elif name not in own and part is not transformers.AutoConfig:
            own[name] = tiny_config(part)
    return cls(**{**sizes, **own})


def tiny_model(name: str, own: dict[str, Any] | None = None) -> Any:
    """A model with random weights in BF16, none of which is zero."""
    cls = getattr(transformers, name)
    config = tiny_config(cls.config_class, own)
    with building():
        elements = sum(parameter.numel() for parameter in cls._from_config(config).parameters())
    assert elements < LIMIT, f"{elements} weights: sizes that the table does not know"
    torch.manual_seed(0)
    model = cls._from_config(config, dtype=torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.any():
                parameter.data.normal_(std=0.02, generator=generator)
    return model.requires_grad_(False)


def inputs_for(model: nn.Module) -> dict[str, Tensor]:
    """What the model takes, as its main input is called; text, and what its decoder writes, besides."""
    config: Any = model.config
    ids = (torch.arange(2 * TOKENS).view(2, TOKENS) * 7 + 5) % (VOCABULARY - 8) + 4
    generator = torch.Generator().manual_seed(2)
    main = str(model.main_input_name)
    shapes = {
        "pixel_values": (2, 3, IMAGE, IMAGE),
        "input_values": (2, 800),
        "input_features": (2, 8, 2 * getattr(config, "max_source_positions", 32)),
    }
    out: dict[str, Tensor] = {"input_ids": ids} if main not in shapes else {}
    if main in shapes:
        out[main] = torch.randn(shapes[main], generator=generator).to(torch.bfloat16)
    if config.is_encoder_decoder:
        out["decoder_input_ids"] = ids[:, :5]
    if hasattr(config, "text_config") and hasattr(config, "vision_config") and hasattr(model, "logit_scale"):
        out["pixel_values"] = torch.randn(shapes["pixel_values"], generator=generator).to(torch.bfloat16)
    return out


def output_of(model: Any) -> Tensor:
    """The first tensor of what the model returns for ``inputs_for``: logits, or hidden states. What a forward
    draws at random, such as the patches that are masked, is the same in all calls.
    """
    torch.manual_seed(3)
    with torch.no_grad():
        out = model(
            **{k: x.to(model.dtype) if x.is_floating_point() else x for k, x in inputs_for(model).items()}
        )
    tensors = (value for value in out.to_tuple() if isinstance(value, Tensor))
    return next(tensors).float()
