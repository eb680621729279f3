"""``config.json`` of a model, made of the metadata of its GGUF file, by Transformers' own table.

Transformers' ``load_gguf_checkpoint`` (5.23) reads the same table; what that leaves out is added here:
experts of Mixtral, widths of experts, heads that are not as wide as usual, and the scaling of positions.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantport.checkpoint import limits
from quantport.errors import CheckpointError
from quantport_formats.gguf_source import GgufSource

# those of every Llama 3 since 3.1
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_SCALARS = (int, float, bool, str)
# metadata -> configuration, where Transformers' table has no entry
_MORE = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_MIXTRAL = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_TOKENS = ("bos", "eos", "padding", "unknown")
_WIDEST_GEMMA = (
    62  # layers of Gemma 3 27B, which alone divides scores by the root of its hidden size per head
)


def config_of(source: GgufSource) -> dict[str, Any]:
    """The configuration that the metadata of a file describes.

    Raises:
        CheckpointError: Transformers is not installed, or a number is beyond the limits.
    """
    family, values = source.family, source.values
    out = _translated(source)
    for key, name in {**_MORE, **(_MIXTRAL if family.model_type == "mixtral" else {})}.items():
        found = values.get(f"{source.architecture}.{key}")
        if type(found) is int and found > 0:
            out.setdefault(name, found)
    out |= {
        "model_type": family.model_type,
        "architectures": [_class_of(family.model_type, source.asked)],
        "tie_word_embeddings": "lm_head.weight" not in source.weights,
    }
    embedding = source.weights.get("model.embed_tokens.weight")
    if embedding is not None:
        out["vocab_size"] = embedding.shape[0]
    if family.model_type == "llama":
        for key, name in (("attention_bias", "self_attn.q_proj"), ("mlp_bias", "mlp.gate_proj")):
            out[key] = f"model.layers.0.{name}.bias" in source.weights
    for name in _TOKENS:
        number = values.get(f"tokenizer.ggml.{name}_token_id")
        if type(number) is int:
            out[{"padding": "pad", "unknown": "unk"}.get(name, name) + "_token_id"] = number
    _of_positions(source, out)
    hidden, heads = out.get("hidden_size"), out.get("num_attention_heads")
    if (
        family.model_type == "gemma3_text"
        and out.get("num_hidden_layers") == _WIDEST_GEMMA
        and hidden
        and heads
    ):
        out["query_pre_attn_scalar"] = hidden // heads
    limits.check_config(out, source.asked)
    return out


def _translated(source: GgufSource) -> dict[str, Any]:
    """What Transformers' table says of the metadata of the architecture."""
    model_type = {"gemma3_text": "gemma3"}.get(source.family.model_type, source.family.model_type)
    ggml = _module("transformers.integrations.ggml", source.asked)
    table = ggml.GGUF_CONFIG_MAPPING.get(model_type) or ggml.GGUF_CONFIG_MAPPING["llama"]
    out = dict(ggml.GGUF_CONFIG_DEFAULTS_MAPPING.get(model_type) or {})
    for key, name in table.items():
        found = source.values.get(f"{source.architecture}.{key}")
        if isinstance(found, list) and len(set(found)) == 1:
            found = found[0]
        if name and isinstance(found, _SCALARS):
            out[name] = found
    return out


def _of_positions(source: GgufSource, out: dict[str, Any]) -> None:
    """Adds how positions are scaled, as far as metadata and factors say it."""
    kind = source.values.get(f"{source.architecture}.rope.scaling.type")
    factor = source.values.get(f"{source.architecture}.rope.scaling.factor")
    first = source.number("rope.scaling.original_context_length")
    head_dim = out.get("head_dim") or (out.get("hidden_size") or 0) // (out.get("num_attention_heads") or 1)
    turned = source.number("rope.dimension_count")
    if source.family.model_type == "phi3" and turned and turned < head_dim:
        out["partial_rotary_factor"] = turned / head_dim
    if "rope_freqs.weight" in source.rope:
        scaling = _llama3(source.read("rope_freqs.weight"), out)
        if scaling:
            out["rope_scaling"] = scaling
    elif len(source.rope) == 2 and first:
        long, short = (source.read(f"rope_factors_{n}.weight").tolist() for n in ("long", "short"))
        out["rope_scaling"] = {"rope_type": "longrope", "long_factor": long, "short_factor": short}
        out["original_max_position_embeddings"] = first
    elif kind == "linear" and isinstance(factor, float) and source.family.model_type != "gemma3_text":
        out["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn" and isinstance(factor, float) and first:
        out["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": first,
        }
    elif source.family.model_type == "gemma3_text" and isinstance(factor, float):
        theta = out.pop("rope_theta", 1e6)
        out["rope_parameters"] = {
            "full_attention": {"rope_type": "linear", "factor": factor, "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }


def _llama3(factors: Tensor, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaling of Llama 3 that has these factors; None where none has.

    Factors divide frequencies: 1 for short waves, the whole factor for long ones, and between them as
    ``_compute_llama3_parameters`` of Transformers' ``modeling_rope_utils.py``.
    """
    theta, factor = float(config.get("rope_theta") or 1e4), float(factors.max())
    if theta <= 0 or factor < 1:
        return None
    scaling = {"rope_type": "llama3", "factor": factor, **LLAMA3}
    expected = llama3_factors(scaling, theta, factors.numel())
    return scaling if torch.allclose(factors.double(), expected, rtol=1e-4) else None


def llama3_factors(scaling: Mapping[str, Any], theta: float, count: int) -> Tensor:
    """What the scaling of Llama 3 divides frequencies by: fp64 ``[count]``."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = 2 * torch.pi * theta ** (torch.arange(count, dtype=torch.float64, device="cpu") / count)
    smooth = ((scaling["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return factors


def notices(source: GgufSource, config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """For people: what of the file is not used as it was meant.

    Args:
        source: The files.
        config: What `config_of` makes of them; None where ``config.json`` says it.
    """
    out: list[str] = []
    decoded: dict[str, int] = {}
    for weight in source.weights.values():
        if weight.is_decoded:
            decoded[weight.kind.name] = decoded.get(weight.kind.name, 0) + 1
    for name, count in sorted(decoded.items()):
        out.append(f"{count} tensors of type {name} are decoded to 16 bits: no scheme has their numbers")
    scaled = config is None or config.get("rope_scaling") or config.get("rope_parameters")
    kind = source.values.get(f"{source.architecture}.rope.scaling.type")
    if not scaled and (source.rope or kind not in (None, "none")):
        what = f"factors {', '.join(source.rope)}" if source.rope else f"scaling {str(kind)[:40]!r}"
        out.append(f"the {what} of positions is not used: answers to long texts may be worse than they could")
    return tuple(out)


def _class_of(model_type: str, asked: str) -> str:
    """The class of a causal language model."""
    auto = _module("transformers.models.auto.modeling_auto", asked)
    return str(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def _module(name: str, asked: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        suggestion = "pip install 'quantport[transformers]', or config.json beside the file"
        raise CheckpointError(asked, "Transformers is not installed", suggestion) from None
