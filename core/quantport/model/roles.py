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
    UNEVEN_EXPERTS = "uneven_experts"
    SECOND_COPY = "second_copy"
    # the model
    NO_MODULE = "no_module"
    WHOLE_MODEL = "whole_model"
    QUANTIZED_ALREADY = "quantized_already"
    OTHER_LINEAR = "other_linear"
    OTHER_EXPERTS = "other_experts"
    OTHER_EMBEDDING = "other_embedding"
    TIED = "tied"
    FUSED_ENCODER = "fused_encoder"
    HOOKED = "hooked"
    # the configuration
    PATTERN = "pattern"
    NULL_SCHEME = "null_scheme"
    FIRST_BLOCKS = "first_blocks"
    NULL_COMPONENT = "null_component"

    def __str__(self) -> str:
        return self.value


_CONFIGURED = {SkipCode.PATTERN, SkipCode.NULL_SCHEME, SkipCode.FIRST_BLOCKS, SkipCode.NULL_COMPONENT}
_LEFT_ALONE = {
    Role.EMBEDDING: "embedding: looked up, not multiplied",
    Role.HEAD: "output head: left in 16 bits by default",
    Role.ROUTER: "router: left in 16 bits, it decides which experts run",
}
_HEADS = {"lm_head", "embed_out", "output_projection"}
_CLASSIFIERS = {"classifier", "score"}
_ROUTERS = {"gate", "router", "shared_expert_gate", "gate_network"}
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


def role_of(module: str) -> Role:
    """The role of a matrix, by the name of its module."""
    last = module.rpartition(".")[2]
    if last in _HEADS:
        return Role.HEAD
    if last in _ROUTERS or ".router." in f".{module}.":
        return Role.ROUTER
    if last in _EMBEDDINGS or "embed" in last:
        return Role.EMBEDDING
    return Role.CLASSIFIER if last in _CLASSIFIERS else Role.LINEAR


def skipped_by_default(role: Role) -> SkipReason | None:
    """Why a layer of this role is left alone where nobody says otherwise, or None."""
    text = _LEFT_ALONE.get(role)
    return SkipReason(SkipCode.ROLE, text) if text else None
