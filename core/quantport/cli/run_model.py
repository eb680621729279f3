"""``quantport run`` and ``quantport quantize``: load, then generate and compare, or write."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quantport
from quantport.checkpoint.partial import check_free
from quantport.cli import baseline, compare
from quantport.cli.output import write
from quantport.cli.page import Column, Grid, emit, progress, size
from quantport.cli.plans import plan_page
from quantport.errors import ConfigError, SaveError
from quantport.loading import quantize_checkpoint
from quantport.loading.compiled_step import MAX_LENGTH
from quantport.loading.locate import locate, open_checkpoint, pretrained
from quantport.loading.save_model import format_at
from quantport.planning.memory import parse_size
from quantport.plugins.registry import default_registry

_OPTIONS = {"overwrite=True": "--overwrite", "format='quantport'": "--format quantport"}


@dataclass(frozen=True)
class Request:
    """What to load, and how: the arguments of ``quantport.load``."""

    model: str
    scheme: str | None
    device: str
    config: dict[str, Any] | None
    num_tokens: int
    fallback: str | None

    def load(self) -> Any:
        """Loads the model behind a progress bar."""
        with progress("loading and quantizing") as report:
            return quantport.load(self.model, self.scheme, **self.options, progress=report)

    @property
    def options(self) -> dict[str, Any]:
        """Those arguments of ``load`` that are its keywords."""
        return {
            "config": self.config,
            "device": self.device,
            "num_tokens": self.num_tokens,
            "fallback": self.fallback,
        }


@dataclass(frozen=True)
class Text:
    """What to generate; ``chat`` says whether to ask with the chat template, None where there is one, and
    ``compiled`` whether by a compiled step.
    """

    prompt: str
    tokens: int
    seed: int
    chat: bool | None = None
    compiled: bool = False


@dataclass(frozen=True)
class Comparison:
    """What to compare on: a text file, at most so many windows of it, and the checkpoint of the original."""

    text: Path | None
    windows: int
    baseline: str | None


@dataclass(frozen=True)
class Against:
    """What a model is compared with: the checkpoint of the original, on tokens ``[windows, length]`` of a
    text.
    """

    base: Path
    source: str
    windows: Tensor


def run(request: Request, text: Text, comparison: Comparison | None, form: str) -> None:
    """Loads, generates and compares. In a terminal the text is shown before the rest is measured."""
    directory = locate(request.model)
    with baseline.hushed():
        place = pretrained(directory, default_registry())
        tokenizer = baseline.tokenizer(directory, place)
        chat = baseline.chats(tokenizer) if text.chat is None else text.chat
        ids = _prompt(tokenizer, text.prompt, chat)
        positions = baseline.positions(directory, place)
        _fits(positions, ids, text.tokens)
        against = _prepare(comparison, directory, tokenizer, positions) if comparison else None
        torch.manual_seed(text.seed)
        start = time.perf_counter()
        model = request.load()
        seconds = time.perf_counter() - start
        _generates(model)
        ids = ids.to(model.device)
        if text.compiled:
            quantport.compile_decode(model, max(ids.shape[1] + text.tokens, MAX_LENGTH))
        compare.warm_up(model, ids, text.tokens)
        out, rate = compare.timed(model, ids, text.tokens)
        written = _decode(tokenizer, out, ids, chat)
        if form == "table":
            write(f"{written}\n")
        page = plan_page(model.quantport_plan)
        page.data = {
            "text": written,
            "chat": chat,
            "load_seconds": seconds,
            "tokens_per_second": rate,
            "plan": page.data,
        }
        page.say(f"loaded in {seconds:.1f} s; {rate:.1f} tokens/s after a warm-up")
        if against:
            measured, out = _compare(model, against, ids, text.tokens)
            page.data["compare"] = {**measured, "text_bf16": _decode(tokenizer, out, ids, chat)}
            page.blocks.append(_grid(page.data["compare"]))
    if form != "table":
        page.blocks.insert(0, Grid((Column("text"),), [(written,)]))
    emit(page, form)


def _prepare(comparison: Comparison, directory: Path, tokenizer: Any, positions: int | None) -> Against:
    """Everything that a comparison needs beside the model: what is wrong shows before that is loaded."""
    base = baseline.find(directory, comparison.baseline)
    sample = baseline.sample(directory, base, comparison.text)
    ids = tokenizer(sample.text, verbose=False).input_ids
    return Against(base, sample.source, compare.cut(ids, comparison.windows, positions))


def _compare(model: Any, against: Against, ids: Tensor, tokens: int) -> tuple[dict[str, Any], Tensor]:
    """Quality on the same windows, speed in turns, of both models side by side in memory; and what the
    original generates.
    """
    made = model.quantport_plan
    base = baseline.load(model, against.base)
    with progress("comparing with BF16", "windows") as report:
        quality = compare.quality(model, base, against.windows.to(model.device), report)
    rates = compare.rates({"quantized": model, "bf16": base}, ids, tokens)
    decoded = getattr(base, "quantport_plan", None)
    weights = {p.data_ptr(): p.nbytes for p in base.parameters()}
    measured = {
        **quality,
        "source": against.source,
        "bytes": made.after,
        "bytes_bf16": decoded.after if decoded else sum(weights.values()),
        "kv_cache": made.kv_cache,
        "tokens_per_second": rates["quantized"],
        "tokens_per_second_bf16": rates["bf16"],
    }
    return measured, compare.generate(base, ids, tokens)


def _decode(tokenizer: Any, out: Tensor, ids: Tensor, chat: bool) -> str:
    """The text that was generated: of a chat the answer, else with the prompt that it continues."""
    return str(tokenizer.decode(out[0, ids.shape[1] if chat else 0 :], skip_special_tokens=True))


def _grid(c: dict[str, Any]) -> Grid:
    change = c["perplexity"] / c["perplexity_bf16"] - 1
    speed = c["tokens_per_second"] / c["tokens_per_second_bf16"]
    rows = (
        ("perplexity", f"{c['perplexity_bf16']:.3f}", f"{c['perplexity']:.3f}", f"{change:+.2%}"),
        ("KL divergence (nats/token)", "0", f"{c['kl']:.5f}", ""),
        ("top-1 agreement", "100%", f"{c['top1']:.1%}", ""),
        (
            "bytes of weights",
            size(c["bytes_bf16"]),
            size(c["bytes"]),
            f"{c['bytes'] / c['bytes_bf16'] - 1:+.0%}",
        ),
        *_kv_row(c["kv_cache"]),
        ("tokens/s", f"{c['tokens_per_second_bf16']:.1f}", f"{c['tokens_per_second']:.1f}", f"{speed:.2f}x"),
    )
    columns = (
        Column(""),
        Column("BF16", right=True),
        Column("quantized", right=True),
        Column("change", right=True),
    )
    title = f"against BF16, {c['tokens_scored']} tokens of {c['source']} in windows of {c['window']}"
    return Grid(columns, rows, title)


def _kv_row(kv: dict[str, Any]) -> list[tuple[str, ...]]:
    bf16, per_token = kv["bytes_per_token_bf16"], kv["bytes_per_token"]
    return [("KV bytes/token", str(bf16), str(per_token), f"{per_token / bf16 - 1:+.0%}")] if bf16 else []


def _prompt(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """Tokens ``[1, prompt]``; an empty prompt is the beginning of a text, where the tokenizer has one."""
    if chat:
        text = baseline.chat_text(tokenizer, prompt)
        ids = list(tokenizer(text, verbose=False, add_special_tokens=False).input_ids)
    else:
        ids = list(tokenizer(prompt, verbose=False).input_ids)
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise ConfigError(f"--prompt {prompt!r}", "it has no tokens", "some text to continue")
    return torch.tensor([ids], dtype=torch.int64, device="cpu")


def _fits(positions: int | None, ids: Tensor, tokens: int) -> None:
    """Refuses a text longer than the positions of the model."""
    if positions is not None and ids.shape[1] + tokens > positions:
        found = f"the model has {positions} positions, and the prompt has {ids.shape[1]} tokens"
        most = positions - ids.shape[1]
        raise ConfigError(
            f"--tokens {tokens}", found, f"--tokens {most}" if most > 0 else "a shorter --prompt"
        )


def _generates(model: Any) -> None:
    """Refuses a model that writes no text."""
    if not (hasattr(model, "can_generate") and model.can_generate()):
        suggestion = "a causal language model; quantport.load in Python for any other"
        raise ConfigError(f"run {type(model).__name__}", "it does not generate text", suggestion)


def quantize(
    request: Request, out: Path, overwrite: bool, max_shard_size: str, format_name: str, form: str
) -> None:
    """Quantizes a checkpoint into a directory; what would refuse that in the end does so before the work."""
    limit = parse_size(max_shard_size, "--max-shard-size")
    source = locate(request.model)
    to = format_at(out, format_name, None)
    is_file = to is not None and to.file_suffix and out.name.endswith(to.file_suffix)
    _writable(out, overwrite, source, is_file=bool(is_file))
    with progress(f"quantizing into {out}") as report, _in_words_of_the_shell():
        plan = quantize_checkpoint(
            request.model,
            out,
            request.scheme,
            **request.options,
            overwrite=overwrite,
            max_shard_bytes=limit,
            progress=report,
            format=format_name,
        )
    page = plan_page(plan)
    written = sum(f.stat().st_size for f in (out.iterdir() if out.is_dir() else (out,)))
    with open_checkpoint(out, default_registry(), headers_only=True) as (found, _):
        name = found.format_name
    page.data = {"directory": str(out), "format": name, "bytes_written": written, "plan": page.data}
    page.say(f"wrote {out} as {name}: {size(written)}; try `quantport run {out}`", "good")
    emit(page, form)


@contextmanager
def _in_words_of_the_shell(asked: str = "") -> Iterator[None]:
    """Says options in place of arguments of Python."""
    try:
        yield
    except SaveError as error:
        suggestion = error.suggestion
        for argument, option in _OPTIONS.items():
            suggestion = suggestion.replace(argument, option)
        raise SaveError(asked or error.asked, error.found, suggestion) from None


def _writable(out: Path, overwrite: bool, source: Path, *, is_file: bool) -> None:
    asked = f"write {out}"
    read = Path(os.path.realpath(source))
    if Path(os.path.realpath(out)) in (read, *read.parents):
        raise SaveError(asked, f"the checkpoint that is read is there: {source}", "another directory")
    with _in_words_of_the_shell(asked):
        check_free(out, overwrite, is_file=is_file)
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        found = f"no permission to write in {parent}" if parent.is_dir() else f"{parent} is a file"
        raise SaveError(asked, found, "a directory that you may write")
