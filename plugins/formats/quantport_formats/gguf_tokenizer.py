"""Tokenizers as GGUF has them, made of ``tokenizer.json`` and turned into it.

GGUF names how a tokenizer of byte pairs splits a text, ``tokenizer.ggml.pre``, and llama.cpp knows the rest.
Sources: llama.cpp ``src/llama-vocab.cpp``, ``llama_vocab::impl::load`` and ``llm_tokenizer_bpe``; its
``conversion/base.py``, ``get_vocab_base``; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from quantport.errors import QuantportError, SaveError
from quantport_formats.gguf_source import library

_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_STEPS: Mapping[str, list[dict[str, Any]]] = {
    "gpt-2": [{**_BYTES, "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {**_BYTES, "use_regex": True}],
    "llama-bpe": [_split(_CONTRACTED + r"\p{N}{1,3}" + _REST), {**_BYTES, "use_regex": False}],
    "qwen2": [_split(_CONTRACTED + r"\p{N}" + _REST), {**_BYTES, "use_regex": False}],
}
"""How each ``tokenizer.ggml.pre`` that is written splits a text: steps of ``pre_tokenizer``."""
_NORMALIZER = "quantport.tokenizer.normalizer"  # of ours alone: llama.cpp leaves it to who writes the text
_IGNORES_MERGES = "llama-bpe"  # a word that is a token stays whole
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
_LONG = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # as GGUF spells them
_KNOWN = f"a byte-level BPE that splits as one of {', '.join(_STEPS)}, or format='quantport'"


def add_tokenizer(
    asked: str, writer: Any, files: Mapping[str, bytes | Path], config: Mapping[str, Any]
) -> None:
    """Adds the tokenizer of a model to a ``GGUFWriter``.

    Args:
        asked: What was asked, for errors.
        writer: Gets the tokens, merges, special ids and chat template.
        files: What lies beside the weights: ``tokenizer.json``, and ``tokenizer_config.json`` and
            ``chat_template.jinja`` where they are.
        config: ``config.json``, which says how many tokens there are, and special ids that the others do not.

    Raises:
        SaveError: there is none, or GGUF cannot hold it.
    """
    if "tokenizer.json" not in files:
        raise SaveError(asked, "no tokenizer.json beside the weights", "a checkpoint directory with one")
    try:
        _add(asked, writer, files, config)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:  # files of others
        found = f"tokenizer.json or tokenizer_config.json is malformed: {type(error).__name__}: {error}"
        raise SaveError(asked, found, "a tokenizer that Transformers can read") from error


def _add(asked: str, writer: Any, files: Mapping[str, bytes | Path], config: Mapping[str, Any]) -> None:
    tokenizer, settings = (
        json.loads(_bytes(files.get(name, b"{}"))) for name in ("tokenizer.json", "tokenizer_config.json")
    )
    model, added = tokenizer.get("model") or {}, tokenizer.get("added_tokens") or []
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre(asked, tokenizer, model))
    writer.add_string(_NORMALIZER, "NFC" if tokenizer.get("normalizer") else "none")  # "" is not written
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
    tokens, types = _tokens(asked, ids, added, config["vocab_size"])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    special = dict(_special(ids, settings, config))
    for role, number in special.items():
        getattr(writer, f"add_{role}_token_id")(number)
    first, last = _ends(asked, tokenizer, settings, ids, special)
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)
    template = _bytes(files.get("chat_template.jinja", b"")).decode() or settings.get("chat_template")
    if template:
        writer.add_chat_template(template)


def _special(
    ids: Mapping[str, int], settings: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[tuple[str, int]]:
    """The id of each role that a token has, the first where there are several."""
    for role in _ROLES:
        token = settings.get(f"{role}_token")
        text = token["content"] if isinstance(token, dict) else token
        number = ids.get(text) if isinstance(text, str) else None
        number = config.get(f"{role}_token_id") if number is None else number
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int:
            yield role, number


def _pre(asked: str, tokenizer: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """``tokenizer.ggml.pre`` of a tokenizer; refuses what llama.cpp would do in another way."""
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("unk_token"):
        kind = "BPE with byte_fallback or unknown tokens" if model.get("type") == "BPE" else model.get("type")
        _refuse(asked, f"a tokenizer of type {kind}")
    normalizers = [step["type"] for step in _steps(tokenizer.get("normalizer"))]
    if set(normalizers) - {"NFC"}:  # as llama.cpp's own conversion, which leaves NFC to who writes the text
        _refuse(asked, f"a tokenizer that normalizes with {', '.join(normalizers)}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            _refuse(asked, f"a tokenizer with {key} {model[key]!r}")
    for token in tokenizer.get("added_tokens") or []:
        for key in ("lstrip", "rstrip", "single_word"):
            if token.get(key):
                _refuse(asked, f"the token {token['content']!r} with {key}")
    steps = [dict(step) for step in _steps(tokenizer.get("pre_tokenizer"))]
    for step in steps:
        step.update({"trim_offsets": True} if "trim_offsets" in step else {})  # of no effect on tokens
    pre = next((name for name, known in _STEPS.items() if known == steps), None)
    if pre is None:
        _refuse(asked, f"a tokenizer that splits with {json.dumps(steps, ensure_ascii=False)[:300]}")
    if bool(model.get("ignore_merges")) is not (pre == _IGNORES_MERGES):
        _refuse(asked, f"a tokenizer that splits as {pre}, with ignore_merges {model.get('ignore_merges')}")
    return pre


def _tokens(
    asked: str, ids: Mapping[str, int], added: list[dict[str, Any]], count: int
) -> tuple[list[str], list[int]]:
    """Tokens and their types, in the order of their ids, filled up to the rows of the embedding."""
    if max(ids.values()) >= count:
        _refuse(asked, f"{max(ids.values()) + 1} tokens for the {count} rows of the embedding")
    tokens, types = [f"[PAD{i}]" for i in range(count)], [_UNUSED] * count
    for text, i in ids.items():
        tokens[i], types[i] = text, _NORMAL
    for token in added:
        types[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    return tokens, types


def _ends(
    asked: str,
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    ids: Mapping[str, int],
    special: Mapping[str, int],
) -> tuple[bool, bool]:
    """Whether a text gets a first and a last token; what Transformers is told counts before the template."""
    first, last = False, False
    for step in _steps(tokenizer.get("post_processor")):
        if step["type"] == "TemplateProcessing":
            pieces = [
                ids.get(p["SpecialToken"]["id"]) if "SpecialToken" in p else ... for p in step["single"]
            ]
            first, last = pieces[0] is not ..., pieces[-1] is not ...
            expected = [*[special.get("bos")] * first, ..., *[special.get("eos")] * last]
            if pieces != expected:
                _refuse(asked, "a tokenizer that adds other tokens to a text than a first and a last one")
        elif step["type"] != "ByteLevel":
            _refuse(asked, f"a tokenizer that adds tokens with {step['type']}")
    if "add_bos_token" in settings or "add_eos_token" in settings:
        return bool(settings.get("add_bos_token")), bool(settings.get("add_eos_token"))
    return first, last


def _steps(described: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a part of ``tokenizer.json``, which are a sequence, or one."""
    if described is None:
        return
    if described["type"] != "Sequence":
        yield described
    for key in ("pretokenizers", "normalizers", "processors"):
        for step in described.get(key, ()):
            yield from _steps(step)


def _refuse(asked: str, found: str) -> NoReturn:
    raise SaveError(asked, f"{found}, which GGUF has no name for", _KNOWN)


def _bytes(content: bytes | Path) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """The files of the tokenizer in a GGUF file; none where it has none.

    Those that this module writes come back as they were; of all others it is what Transformers makes of them.

    Raises:
        SaveError: the libraries cannot read it.
    """
    asked = f"save the model of {path}"
    try:
        fields = library(asked).GGUFReader(path).fields
        values = {key: field.contents() for key, field in fields.items() if "tokenizer." in key}
        if "tokenizer.ggml.model" not in values:
            return {}
        transformers = importlib.import_module("transformers")
        if values["tokenizer.ggml.model"] == "gpt2" and values.get("tokenizer.ggml.pre") in _STEPS:
            made = _of_bytes(transformers, values)
        else:
            made = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        with TemporaryDirectory() as folder:
            made.save_pretrained(folder)
            return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}
    except QuantportError:
        raise
    except Exception as error:  # Transformers and tokenizers raise a zoo of types
        found = f"its tokenizer cannot be read: {type(error).__name__}: {error}"
        suggestion = "config.json and the tokenizer of the original beside the file"
        raise SaveError(asked, found, suggestion) from error


def _of_bytes(transformers: Any, values: Mapping[str, Any]) -> Any:
    """A tokenizer of byte pairs, as ``tokenizer.*`` describes it."""
    tokens, types, pre = (values[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "pre"))
    added = [
        {
            "id": i,
            "content": tokens[i],
            "special": kind == _CONTROL,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for i, kind in enumerate(types)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    normalizer = values.get(_NORMALIZER, "NFC" if pre == "qwen2" else "")
    described = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": normalizer} if normalizer == "NFC" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _STEPS[pre]},
        "decoder": {**_BYTES, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED},
            "merges": values["tokenizer.ggml.merges"],
            "ignore_merges": pre == _IGNORES_MERGES,
        },
    }
    ids = {role: values.get(f"tokenizer.ggml.{_LONG.get(role, role)}_token_id") for role in _ROLES}
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=importlib.import_module("tokenizers").Tokenizer.from_str(json.dumps(described)),
        **{f"{role}_token": tokens[i] for role, i in ids.items() if i is not None},
        **{f"add_{end}_token": bool(values.get(f"tokenizer.ggml.add_{end}_token")) for end in ("bos", "eos")},
    )
    made.chat_template = values.get("tokenizer.chat_template")
    return made
