"""Checkpoints that are saved as GGUF: models of `gguf_files` with a tokenizer of byte pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf_files import Made
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

IDS = torch.arange(1, 9).view(1, -1)


def tokenizer(pre: str = "gpt-2") -> Tokenizer:
    """Bytes, a few merges, and added tokens of both kinds, of a way to split a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("Ġ", "i"), ("2", "0"), ("1", "2"), ("12", "3"), ("Ġi", "t"), ("'", "s")]
    words = ["<|begin|>", "<|end|>", *letters, *map("".join, merges), "Ġwhole", "None"]
    model = models.BPE({w: i for i, w in enumerate(words)}, merges, ignore_merges=pre == "llama-bpe")
    made = Tokenizer(model)
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + "{1,3}" * (pre == "llama-bpe")
    split += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    plain = pre in ("gpt-2", "smollm")
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=plain)]
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif not plain:
        steps.insert(0, pre_tokenizers.Split(Regex(split), "isolated"))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(w, normalized=False) for w in words[:2]])
    made.add_tokens([AddedToken("<think>", normalized=False)])
    if pre == "llama-bpe":
        begin = ("<|begin|>", made.token_to_id("<|begin|>"))
        first = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
        made.post_processor = processors.Sequence([processors.ByteLevel(), first])
    return made


def write_tokenizer(folder: Path, made: Tokenizer, **settings: Any) -> None:
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|begin|>", eos_token="<|end|>", **settings
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    fast.save_pretrained(folder)


def base(folder: Path, model: Made) -> Path:
    """The checkpoint that a model is loaded from, with a tokenizer."""
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in model.tensors.items()}, folder / "model.safetensors")
    described = {**model.model.config.to_dict(), "architectures": [type(model.model).__name__]}
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    write_tokenizer(folder, tokenizer())
    return folder


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits
