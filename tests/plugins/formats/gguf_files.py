"""Writes small models as GGUF with gguf's own writer, under the names of its own table, as llama.cpp's
``convert_hf_to_gguf.py`` does: rows of q and k of Llama in pairs, norms of Gemma with one added, experts
stacked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from torch import Tensor

HEADS, KV_HEADS, HEAD, HIDDEN = 4, 2, 64, 256
SIZES = {
    "vocab_size": 512,
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = 4
_CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mixtral": transformers.MixtralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen2moe": transformers.Qwen2MoeConfig,
    "qwen3": transformers.Qwen3Config,
    "qwen3moe": transformers.Qwen3MoeConfig,
    "gemma3": transformers.Gemma3TextConfig,
    "phi3": transformers.Phi3Config,
}
_MORE = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen2moe": {"num_experts": EXPERTS, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 512},
    "qwen3": {"head_dim": HEAD},
    "qwen3moe": {"head_dim": HEAD, "num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "gemma3": {"head_dim": HEAD, "query_pre_attn_scalar": 256},
}
KINDS = tuple(_CONFIGS)
NAMED_EXPERTS = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen3moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


@dataclass
class Made:
    """A model, and what its GGUF file stores.

    Attributes:
        model: In fp32.
        tensors: Its tensors as checkpoints on the hub name them.
        stored: GGUF name -> values as llama.cpp's conversion has them.
        values: Metadata.
    """

    kind: str
    model: Any
    tensors: dict[str, Tensor]
    stored: dict[str, np.ndarray] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return {"mixtral": "llama"}.get(self.kind, self.kind)


def made(kind: str, tied: bool = False) -> Made:
    """A small model with random weights and norms that bf16 has too."""
    torch.manual_seed(0)
    config = _CONFIGS[kind](**{**SIZES, **_MORE.get(kind, {}), "tie_word_embeddings": tied})
    if kind in NAMED_EXPERTS:
        config.moe_intermediate_size = SIZES["intermediate_size"]
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = torch.rand(parameter.shape).bfloat16().float()
        elif "gate.weight" in name:
            parameter.data = torch.randn(parameter.shape)
    out = Made(kind, model, _named(kind, model.state_dict(), tied))
    _store(out)
    _describe(out, config)
    return out


def _named(kind: str, state: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        if leaf in ("gate_up_proj", "down_proj"):
            block, gate, up, down = NAMED_EXPERTS[kind]
            path = path.replace(".mlp.", f".{block}.")
            for e, one in enumerate(tensor):
                parts = (
                    {down: one} if leaf == "down_proj" else dict(zip((gate, up), one.chunk(2), strict=True))
                )
                tensors |= {f"{path}.{e}.{part}.weight": w for part, w in parts.items()}
        elif name != "lm_head.weight" or not tied:
            tensors[name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if kind == "mixtral" else name] = (
                tensor
            )
    return tensors


def _store(out: Made) -> None:
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[out.architecture]
    names = gguf.get_tensor_name_map(arch, SIZES["num_hidden_layers"])
    stacks: dict[str, list[np.ndarray]] = {}
    for name, tensor in out.tensors.items():
        stem, _, leaf = name.rpartition(".")
        values = tensor.numpy()
        if out.architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = HEADS if stem.endswith("q_proj") else KV_HEADS
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if stem.endswith("shared_expert_gate"):
            values = values.squeeze(0)
        if out.kind == "gemma3" and stem.endswith("norm"):
            values = values + 1
        merged = re.sub(r"experts\.\d+\.", "experts.", stem)
        found = names.get_name(merged)
        assert found, name
        if merged != stem:
            stacks.setdefault(f"{found}.{leaf}", []).append(values)
        else:
            out.stored[f"{found}.{leaf}"] = values
    out.stored |= {name: np.stack(parts) for name, parts in stacks.items()}


def _describe(out: Made, config: Any) -> None:
    arch, rope = out.architecture, config.rope_parameters
    out.values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": HEAD,
        "rope.dimension_count": HEAD,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
    }
    if out.kind == "gemma3":
        out.values["attention.sliding_window"] = config.sliding_window
    if out.kind in NAMED_EXPERTS:
        out.values |= {
            "expert_count": EXPERTS,
            "expert_used_count": 2,
            "expert_feed_forward_length": SIZES["intermediate_size"],
        }
    if out.kind == "qwen2moe":
        out.values["expert_shared_feed_forward_length"] = 512
    out.values = {f"{arch}.{key}": value for key, value in out.values.items()}
    for token, name in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        out.values[f"tokenizer.ggml.{name}_token_id"] = SIZES[f"{token}_token_id"]


def write(path: Path, model: Made, types: Mapping[str, str] | str = "F32") -> dict[str, np.ndarray]:
    """Writes a file.

    Args:
        path: The file.
        model: The model.
        types: Type of the matrices, by the end of GGUF names without ``.weight``, or of all; F32 for others.

    Returns:
        What each tensor stores, by its GGUF name: bytes of rows, or numbers.
    """
    writer = gguf.GGUFWriter(path, model.architecture)
    for key, value in model.values.items():
        writer.add_float32(key, value) if isinstance(value, float) else writer.add_uint32(key, value)
    written = {}
    for name, values in model.stored.items():
        stem = name.removesuffix(".weight")
        kind = (
            types
            if isinstance(types, str)
            else next((t for e, t in types.items() if stem.endswith(e)), "F32")
        )
        enum = gguf.GGMLQuantizationType["F32" if values.ndim == 1 else kind]
        written[name] = encoded(values, enum)
        writer.add_tensor(name, written[name], raw_dtype=enum)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def encoded(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """As gguf quantizes values; where it cannot, random blocks with small scales."""
    try:
        return gguf.quants.quantize(np.ascontiguousarray(values), kind)
    except NotImplementedError:
        pass
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(
        0, 256, (*values.shape[:-1], values.shape[-1] // block, size), np.uint8
    )
    halves = {
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q6_K": (208,),
        "IQ4_NL": (0,),
    }
    for at in halves[kind.name]:
        raw[..., at : at + 2] = np.float16(0.001).reshape(1).view(np.uint8)
    return raw.reshape(*values.shape[:-1], -1)


def in_order(values: np.ndarray, name: str, architecture: str) -> np.ndarray:
    """Values of a tensor as they were before the conversion, by Transformers' own code."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    config = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    return np.ascontiguousarray(processor.process(values, name).weights)
