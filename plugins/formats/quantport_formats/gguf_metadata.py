"""The metadata of a GGUF file that say what a model computes, made of ``config.json``.

Sources: llama.cpp ``conversion/base.py``, ``TextModel.set_gguf_parameters``, ``conversion/llama.py`` and
``qwen.py``; what its graphs compute: ``llama.cpp``, ``qwen2.cpp``, ``qwen3.cpp``, ``qwen3moe.cpp`` of
``src/models``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from quantport.errors import SaveError
from quantport_formats.gguf_config import LLAMA3, llama3_factors
from quantport_formats.gguf_names import FAMILIES

WRITTEN = ("llama", "qwen2", "qwen3", "qwen3moe")
"""The architectures of `FAMILIES` that are written."""

_COUNTS = {
    "num_hidden_layers": "add_block_count",
    "max_position_embeddings": "add_context_length",
    "hidden_size": "add_embedding_length",
    "intermediate_size": "add_feed_forward_length",
    "num_attention_heads": "add_head_count",
    "num_key_value_heads": "add_head_count_kv",
    "vocab_size": "add_vocab_size",
    "num_experts": "add_expert_count",
    "num_local_experts": "add_expert_count",  # the same, as Transformers writes it
    "num_experts_per_tok": "add_expert_used_count",
    "moe_intermediate_size": "add_expert_feed_forward_length",
}
# what the graphs of llama.cpp compute, where a configuration can say otherwise
_COMPUTED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
    "norm_topk_prob": (True,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
}
_SCALING = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings"},
}


def architecture_of(asked: str, config: Mapping[str, Any] | None) -> str:
    """The architecture of GGUF that computes what a configuration says.

    Raises:
        SaveError: there is none that is written.
    """
    suggestion = (
        f"a model of {', '.join(FAMILIES[name].model_type for name in WRITTEN)}; or format='quantport'"
    )
    found = "a model without config.json" if config is None else f"model_type {config.get('model_type')!r}"
    config = config or {}
    known = (name for name in WRITTEN if FAMILIES[name].model_type == config.get("model_type"))
    architecture = next(known, None)
    if architecture is None:
        raise SaveError(asked, found, suggestion)
    for key, values in _COMPUTED.items():
        if key in config and config[key] not in values:
            raise SaveError(asked, f"{key} {config[key]!r}, which GGUF's {architecture} has not", suggestion)
    if architecture.startswith("qwen3") and config.get("attention_bias"):
        raise SaveError(asked, f"attention_bias, which GGUF's {architecture} has not", suggestion)
    if architecture == "qwen2" and _head_dim(config) * config["num_attention_heads"] != config["hidden_size"]:
        found = f"heads of {_head_dim(config)}, which GGUF's qwen2 takes from the hidden size"
        raise SaveError(asked, found, suggestion)
    return architecture


def add_metadata(asked: str, writer: Any, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Adds sizes, norms and positions to a ``GGUFWriter``.

    Returns:
        Tensors that are metadata elsewhere: factors of the frequencies of positions.

    Raises:
        SaveError: positions are scaled as GGUF does not know.
    """
    for key, add in _COUNTS.items():
        if isinstance(config.get(key), int):
            getattr(writer, add)(config[key])
    head_dim = _head_dim(config)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(rope.pop("rope_theta", config.get("rope_theta") or 1e4))
    kind = str(rope.pop("rope_type", rope.pop("type", "default")))
    rope = {key: value for key, value in rope.items() if value is not None and key != "type"}
    known = kind in _SCALING and rope.keys() == _SCALING[kind]
    if not known or (kind == "llama3" and {**rope, **LLAMA3} != rope):  # factors say no others
        _refuse_positions(asked, {"rope_type": kind, **rope})
    writer.add_rope_freq_base(theta)
    if kind == "llama3":
        return {"rope_freqs.weight": llama3_factors(rope, theta, head_dim // 2).to(torch.float32)}
    if kind in ("linear", "yarn"):
        writer.add_string(f"{writer.arch}.rope.scaling.type", kind)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    return {}


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _refuse_positions(asked: str, rope: Mapping[str, Any]) -> NoReturn:
    found = f"rope_parameters {dict(rope)}"
    raise SaveError(asked, found, f"rope_type {', '.join(_SCALING)} with its factors alone")
