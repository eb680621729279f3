"""What cannot be saved as GGUF: refused by name, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf")
from core_models import DENSE, MOE
from gguf_bases import base, tokenizer, write_tokenizer
from gguf_files import made
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

import quantport
from quantport.errors import SaveError
from quantport_formats.gguf_config import LLAMA3


def refused(folder: Path, found: str, change: dict[str, Any], scheme: str = "q8_0") -> None:
    """What is said of a model whose ``config.json`` is changed."""
    model = quantport.load(folder, scheme, device="cpu")
    for key, value in change.items():
        setattr(model.config, key, value)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(SaveError) as caught:
            quantport.save(model, folder.parent / "out", format="gguf", **options)
        assert found in caught.value.found
        assert caught.value.asked
        assert caught.value.suggestion
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', which GGUF's llama has not"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'rope_type': 'dynamic'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, **LLAMA3, "low_freq_factor": 2.0}},
            "llama3",
        ),
        ({"vocab_size": 200}, "tokens for the 200 rows"),
    ],
)
def test_models_that_gguf_has_not_are_refused(change: dict[str, Any], found: str, tmp_path: Path) -> None:
    refused(base(tmp_path / "base", made("llama")), found, change)


def test_biases_that_llama_cpp_has_not_are_refused(tmp_path: Path) -> None:
    refused(base(tmp_path / "base", made("qwen3")), "attention_bias", {"attention_bias": True})


def test_architectures_that_are_not_written_are_refused(tmp_path: Path) -> None:
    refused(base(tmp_path / "base", made("gemma3")), "model_type 'gemma3_text'", {})


@pytest.mark.parametrize("scheme", ["int8", "nf4", "int4_weight_only:hadamard"])
def test_schemes_that_gguf_has_not_are_refused(scheme: str, tmp_path: Path) -> None:
    refused(base(tmp_path / "base", made("llama")), f"scheme {scheme!r}", {}, scheme)


def test_columns_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    model = quantport.load(DENSE, "q4_k", device="cpu")  # whose last block is filled up here
    with pytest.raises(SaveError, match="whose 704 columns are no whole blocks of 256") as caught:
        quantport.save(model, tmp_path / "out", format="gguf")
    assert "down_proj" in caught.value.found
    assert not list(tmp_path.iterdir())
    mixed = {"scheme": "q4_k", "targets": {"*.down_proj": "q8_0"}}
    quantport.save(quantport.load(DENSE, config=mixed, device="cpu"), tmp_path / "out", format="gguf")


def test_experts_that_are_not_quantized_are_refused(tmp_path: Path) -> None:
    model = quantport.load(MOE, config={"linear": "q8_0", "moe": None}, device="cpu")
    with pytest.raises(SaveError, match=r"mlp\.experts\.gate_up_proj, which a qwen3_moe of GGUF has not"):
        quantport.save(model, tmp_path / "out", format="gguf")


def word_level() -> Tokenizer:
    return Tokenizer(models.WordLevel({"a": 0, "<|begin|>": 1, "<|end|>": 2}, unk_token="a"))


def changed(**parts: Any) -> Tokenizer:
    out = tokenizer()
    for name, part in parts.items():
        setattr(out, name, part)
    return out


def of_added(token: AddedToken) -> Tokenizer:
    out = tokenizer()
    out.add_tokens([token])
    return out


CLS = [("<|end|>", 1), ("<|begin|>", 0)]
TOKENIZERS = {
    "kind": (word_level, "a tokenizer of type WordLevel"),
    "sentencepiece": (lambda: Tokenizer(models.BPE(byte_fallback=True)), "BPE with byte_fallback"),
    "split": (
        lambda: changed(pre_tokenizer=pre_tokenizers.Whitespace()),
        'splits with [{"type": "Whitespace"}]',
    ),
    "space": (lambda: changed(pre_tokenizer=pre_tokenizers.ByteLevel()), '"add_prefix_space": true'),
    "lower": (lambda: changed(normalizer=normalizers.Lowercase()), "normalizes with Lowercase"),
    "rule": (lambda: changed(post_processor=processors.BertProcessing(*CLS)), "adds tokens with BertProc"),
    "twice": (
        lambda: changed(
            post_processor=processors.TemplateProcessing(single="<|end|> $A <|end|>", special_tokens=CLS)
        ),
        "adds other tokens to a text",
    ),
    "strip": (lambda: of_added(AddedToken("<x>", lstrip=True)), "the token '<x>' with lstrip"),
}


@pytest.mark.parametrize("case", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers_that_gguf_has_no_name_for_are_refused(case: Any, tmp_path: Path) -> None:
    make, found = case
    folder = base(tmp_path / "base", made("llama"))
    write_tokenizer(folder, make())
    refused(folder, found, {})


@pytest.mark.parametrize("text", [None, "{", "[]", '{"model": {"type": "BPE"}}'])
def test_a_tokenizer_that_is_absent_or_damaged_is_refused(text: str | None, tmp_path: Path) -> None:
    folder = base(tmp_path / "base", made("llama"))
    if text is None:
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "tokenizer.json").write_text(text)
    refused(folder, "no tokenizer.json" if text is None else "malformed" if text in "{[]" else "splits", {})
