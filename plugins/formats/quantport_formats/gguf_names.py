"""Names of GGUF's tensors as Transformers has them, by architecture, and what is done to the tensors of one.

Sources: ``gguf.get_tensor_name_map`` of gguf 0.19 (a test compares), and llama.cpp's
``convert_hf_to_gguf.py``: ``LlamaModel.permute`` of the rows of q and k, and ``Gemma3Model.modify_tensors``,
which adds one to norms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

_BLOCK = re.compile(r"blk\.(\d{1,9})\.([a-z_]+)\.(weight|bias)")
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.([a-z0-9_.]+)\.(weight|bias)")
_EXPERT = re.compile(r"\.experts\.(\d{1,9})\.")
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
OF_ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Factors of the frequencies of positions, which are part of the configuration elsewhere."""

_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_DENSE = {**_ATTENTION, "ffn_norm": "post_attention_layernorm", **_MLP}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_QWEN_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_MIXTRAL_EXPERTS = {
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_GEMMA = {
    **_ATTENTION,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    **_MLP,
}


@dataclass(frozen=True)
class Family:
    """An architecture of GGUF.

    Attributes:
        model_type: As Transformers has it.
        layers: Stems of the tensors of a layer -> modules of the layer.
        experts: Stems of stacks of experts -> modules, with a place for the number.
        permutes: Whether rows of q and k are stored in pairs for the rotation of positions.
        norms_plus_one: Whether one was added to the weights of norms.
    """

    model_type: str
    layers: Mapping[str, str]
    experts: Mapping[str, str] = field(default_factory=dict)
    permutes: bool = False
    norms_plus_one: bool = False


_ROUTER = {"ffn_gate_inp": "mlp.gate"}
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family("llama", _DENSE, permutes=True),
        "qwen2": Family("qwen2", _DENSE),
        "qwen2moe": Family("qwen2_moe", {**_DENSE, **_ROUTER, **_SHARED}, _QWEN_EXPERTS),
        "qwen3": Family("qwen3", {**_DENSE, **_QK_NORMS}),
        "qwen3moe": Family("qwen3_moe", {**_DENSE, **_QK_NORMS, **_ROUTER}, _QWEN_EXPERTS),
        "gemma3": Family("gemma3_text", {**_GEMMA, **_QK_NORMS}, norms_plus_one=True),
        "phi3": Family(
            "phi3",
            {
                "attn_norm": "input_layernorm",
                "attn_qkv": "self_attn.qkv_proj",
                "attn_output": "self_attn.o_proj",
                "ffn_norm": "post_attention_layernorm",
                "ffn_up": "mlp.gate_up_proj",
                "ffn_down": "mlp.down_proj",
            },
        ),
    }
)
MIXTRAL = Family(
    "mixtral",
    {**_ATTENTION, "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "block_sparse_moe.gate"},
    _MIXTRAL_EXPERTS,
    permutes=True,
)
"""GGUF's architecture is ``llama`` here too."""


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs.

    Attributes:
        name: Its name; with a place for the number of an expert where it is a stack.
        stem: Of its GGUF name: ``attn_q``.
        layer: Number of its layer; -1 outside of layers.
        is_stack: Whether it has the matrices of every expert.
        expert: Number of the expert whose matrix goes there; -1 for all others.
    """

    name: str
    stem: str
    layer: int = -1
    is_stack: bool = False
    expert: int = -1


def place_of(name: str, family: Family) -> Place | None:
    """Where a tensor of a family belongs; None where the family has no such tensor."""
    if name in _TOP:
        return Place(_TOP[name], name.partition(".")[0])
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    layer, stem, leaf = int(match[1]), match[2], match[3]
    module = family.layers.get(stem) or family.experts.get(stem)
    if module is None:
        return None
    return Place(f"model.layers.{layer}.{module}.{leaf}", stem, layer, stem in family.experts)


def stored_place(name: str, family: Family) -> Place | None:
    """The opposite of `place_of`: the place whose ``name`` is GGUF's, of an expert that of the stack; None
    where the family has no such tensor.
    """
    for stored, known in _TOP.items():
        if name == known:
            return Place(stored, stored.partition(".")[0])
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    layer, module, leaf = int(match[1]), _EXPERT.sub(".experts.{}.", match[2]), match[3]
    expert = _EXPERT.search(match[2])
    stems = family.experts if expert else family.layers
    stem = next((stem for stem, known in stems.items() if known == module), None)
    if stem is None:
        return None
    return Place(f"blk.{layer}.{stem}.{leaf}", stem, layer, bool(expert), int(expert[1]) if expert else -1)
