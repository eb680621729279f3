"""The architecture, the tokenizer and the on-disk form of the example models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from corpus import Corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 2048
END = "<|endoftext|>"
TRAIN_CONTEXT = 512


def build_model(kind: str) -> transformers.PreTrainedModel:
    """Return a randomly initialised model.

    Args:
        kind: ``dense`` or ``moe``.
    """
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": TRAIN_CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if kind == "dense":
        llama = transformers.LlamaConfig(num_hidden_layers=6, tie_word_embeddings=True, **common)
        return transformers.LlamaForCausalLM(llama)
    moe = transformers.Qwen3MoeConfig(
        num_hidden_layers=4,
        tie_word_embeddings=False,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=160,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        **common,
    )
    return transformers.Qwen3MoeForCausalLM(moe)


def train_tokenizer(corpus: Corpus) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the training documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.train, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=TRAIN_CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def save(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerFast,
    out: Path,
) -> None:
    """Write a BF16 checkpoint in several shards, with its tokenizer."""
    shutil.rmtree(out, ignore_errors=True)
    model.to(torch.bfloat16).eval()
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=False
    )
    model.save_pretrained(out, max_shard_size="3MB")
    tokenizer.save_pretrained(out)
    use_published_names(out)


def use_published_names(out: Path) -> None:
    """Rename the configuration keys that published checkpoints spell differently.

    Transformers 5 writes ``num_local_experts`` and ``TokenizersBackend``, and reads the
    names of published Qwen3-MoE checkpoints just as well. Only the latter are understood by
    older releases.
    """
    path = out / "config.json"
    config = json.loads(path.read_text("utf-8"))
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in out.iterdir():
        file.chmod(0o644)
