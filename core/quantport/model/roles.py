"""What a layer is in its model, and why one is left alone: code decides by roles and codes, people read the
texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Role(str, Enum):
    """What a layer is in its model, as its names, its shapes and its module say."""

    LINEAR = "linear"
    EXPERTS = "experts"
    EMBEDDING = "embedding"
    HEAD = "head"
    CLASSIFIER = "classifier"
    ROUTER = "router"
    CONVOLUTION = "convolution"
    OTHER = "other"

    def __str__(self) -> str:
        return self.value


class SkipCode(str, Enum):
    """Why a layer is left alone."""

    # the checkpoint
    ROLE = "role"
    NOT_A_MATRIX = "not_a_matrix"
    ZERO_SIZE = "zero_size"
    STORED_DTYPE = "stored_dtype"
    CONVOLUTION = "convolution"
    OTHER_PARAMETER = "other_parameter"
    UNEVEN_EXPERTS = "uneven_experts"
    SECOND_COPY = "second_copy"
    BEYOND_CONFIG = "beyond_config"
    # the model
    NO_MODULE = "no_module"
    UNUSED = "unused"
    KEPT_FP32 = "kept_fp32"
    WHOLE_MODEL = "whole_model"
    QUANTIZED_ALREADY = "quantized_already"
    OTHER_LINEAR = "other_linear"
    OTHER_EXPERTS = "other_experts"
    OTHER_EMBEDDING = "other_embedding"
    TIED = "tied"
    WEIGHT_READ = "weight_read"
    HOOKED = "hooked"
    # the configuration
    PATTERN = "pattern"
    NULL_SCHEME = "null_scheme"
    FIRST_BLOCKS = "first_blocks"
    NULL_COMPONENT = "null_component"

    def __str__(self) -> str:
        return self.value


# stored, and not loaded: a copy of another tensor, or something that the model has no place for
NOT_LOADED = frozenset({SkipCode.SECOND_COPY, SkipCode.BEYOND_CONFIG, SkipCode.NO_MODULE, SkipCode.UNUSED})
_CONFIGURED = {SkipCode.PATTERN, SkipCode.NULL_SCHEME, SkipCode.FIRST_BLOCKS, SkipCode.NULL_COMPONENT}
_LEFT_ALONE = {
    Role.EMBEDDING: "embedding: looked up, not multiplied",
    Role.HEAD: "output head: left in 16 bits by default",
    Role.CLASSIFIER: "classifier or projection at the end: left in 16 bits by default",
    Role.ROUTER: "router: left in 16 bits, it decides which experts run",
}
_HEADS = {"lm_head", "embed_out", "output_projection"}
_CLASSIFIERS = {
    "score",
    "qa_outputs",
    "pooler",
    "classification_head",
    "logits_proj",
    "seq_relationship",
    "sequence_summary",
    "text_projection",
    "visual_projection",
}
_GATES = {"gate", "moe_gate", "gating", "gate_network", "shared_expert_gate", "switch"}
_EMBEDDINGS = {
    "wte",
    "wpe",
    "tok_embeddings",
    "word_embeddings",
    "position_embeddings",
    "embeddings",
    "relative_attention_bias",
}


@dataclass(frozen=True)
class SkipReason:
    """Why a layer is left alone.

    Attributes:
        code: What code decides by.
        text: What people read.
    """

    code: SkipCode
    text: str

    @property
    def configured(self) -> bool:
        """Whether the configuration says so, rather than the checkpoint or the model."""
        return self.code in _CONFIGURED

    def __str__(self) -> str:
        return self.text


def role_of(module: str, out_features: int, in_features: int) -> Role:
    """The role of a matrix, by the name of its module; `quantport.model.routers` finds routers that no name
    shows.
    """
    path = module.split(".")
    last = path[-1]
    if not _HEADS.isdisjoint(path):
        return Role.HEAD
    # a projection of a gated MLP may be called ``gate`` too: it is wider than what it reads
    is_gate = not _GATES.isdisjoint(path[-2:]) and out_features <= in_features
    if is_gate or any("router" in part.split("_") for part in path):
        return Role.ROUTER
    if last in _EMBEDDINGS or "embed" in last:
        return Role.EMBEDDING
    if not _CLASSIFIERS.isdisjoint(path) or any("classifier" in part.split("_") for part in path):
        return Role.CLASSIFIER
    return Role.LINEAR


def skipped_by_default(role: Role) -> SkipReason | None:
    """Why a layer of this role is left alone where nobody says otherwise, or None."""
    text = _LEFT_ALONE.get(role)
    return SkipReason(SkipCode.ROLE, text) if text else None
