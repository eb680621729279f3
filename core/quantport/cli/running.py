"""``quantport run``: load, generate, and compare with BF16 on the same text."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quantport
from quantport.cli import show
from quantport.errors import CheckpointError, ConfigError
from quantport.loading.source import locate

WINDOW = 256  # tokens: the context that perplexity is measured in


def run(
    path: str, scheme: str | None, device: str, config: dict[str, Any] | None, rows: int, fallback: str | None,
    prompt: str, tokens: int, seed: int, text: Path | None, compare: bool, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Runs the command; prints unless ``quiet``, and returns what it found as plain data."""
    directory = locate(path)
    tokenizer = _tokenizer(directory)
    sample = _text(directory, text) if compare else ""
    torch.manual_seed(seed)
    with show.progress("loading and quantizing") as report:
        start = time.perf_counter()
        model = quantport.load(path, scheme, config=config, device=device, rows=rows, fallback=fallback, progress=report)
        seconds = time.perf_counter() - start
    written, rate = _generate(model, tokenizer, prompt, tokens)
    made = model.quantport_plan
    out: dict[str, Any] = {"load_seconds": seconds, "text": written, "tokens_per_second": rate, "plan": made.to_dict()}
    if not quiet:
        show.console().print(f"{written}\n", markup=False, highlight=False)
    if compare:
        out["compare"] = _compare(model, directory, tokenizer, sample, prompt, tokens, made)
    if not quiet:
        show.print_plan(made)
        if compare:
            show.console().print(_table(out["compare"]))
    return out


def _compare(model: Any, directory: Path, tokenizer: Any, text: str, prompt: str, tokens: int, made: Any) -> dict[str, Any]:
    """Measures both models on the same windows of the same text, one after the other."""
    device = made.device.torch_device
    windows = _windows(tokenizer, text).to(device)
    logits = score(model, windows)
    _, rate = _generate(model, tokenizer, prompt, tokens)
    transformers = importlib.import_module("transformers")
    cls = getattr(transformers, model.config.architectures[0])
    base = cls.from_pretrained(directory, dtype=model.dtype).to(device).eval()
    expected = score(base, windows)
    base_text, base_rate = _generate(base, tokenizer, prompt, tokens)
    quality = compare_logits(logits, expected, windows)
    return {
        **quality,
        "bytes": made.after,
        "bytes_bf16": made.before,
        "tokens_per_second": rate,
        "tokens_per_second_bf16": base_rate,
        "text_bf16": base_text,
    }


@torch.no_grad()
def score(model: Any, windows: Tensor) -> Tensor:
    """Log-probabilities ``[windows, WINDOW - 1, vocabulary]`` of each next token, fp32 on the CPU."""
    rows = [model(w[None]).logits[0, :-1].float().log_softmax(-1).cpu() for w in windows]
    return torch.stack(rows)


def compare_logits(found: Tensor, expected: Tensor, windows: Tensor) -> dict[str, float]:
    """Perplexity of both, mean KL(expected || found) in nats per token, and the share of equal top-1 tokens.

    Args:
        found: Log-probabilities of the quantized model, from ``score``.
        expected: Those of the baseline.
        windows: The tokens ``[windows, WINDOW]``.
    """
    target = windows[:, 1:, None].cpu()
    return {
        "perplexity": found.gather(-1, target).mean().neg().exp().item(),
        "perplexity_bf16": expected.gather(-1, target).mean().neg().exp().item(),
        "kl": (expected.exp() * (expected - found)).sum(-1).mean().item(),
        "top1": (found.argmax(-1) == expected.argmax(-1)).float().mean().item(),
    }


@torch.no_grad()
def _generate(model: Any, tokenizer: Any, prompt: str, tokens: int) -> tuple[str, float]:
    """Greedy text and tokens per second."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    start = time.perf_counter()
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    seconds = time.perf_counter() - start
    return str(tokenizer.decode(out[0], skip_special_tokens=True)), (out.shape[1] - ids.shape[1]) / seconds


def _windows(tokenizer: Any, text: str) -> Tensor:
    """Cuts a text into as many full windows as it has (at most 64)."""
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    count = min(len(ids) // WINDOW, 64)
    if not count:
        raise ConfigError("--compare", f"a text of {len(ids)} tokens", f"a text of at least {WINDOW} tokens: --text FILE")
    return ids[: count * WINDOW].view(count, WINDOW)


def _tokenizer(directory: Path) -> Any:
    if not (directory / "config.json").exists():
        raise CheckpointError(f"run {directory}", "no config.json there", "a Transformers checkpoint directory with a tokenizer")
    try:
        return importlib.import_module("transformers").AutoTokenizer.from_pretrained(directory)
    except ImportError:
        raise CheckpointError(
            f"run {directory}", "Transformers is not installed", "pip install 'quantport[transformers]'"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"read the tokenizer of {directory}", str(error).splitlines()[0], "tokenizer.json beside config.json"
        ) from error


def _text(directory: Path, text: Path | None) -> str:
    for path in [text] if text else [directory / "eval.txt", directory.parent / "eval.txt"]:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise ConfigError(
        "--compare", f"no evaluation text {text or 'eval.txt beside the model'}", "--text FILE, some pages of plain text"
    )


def _table(c: dict[str, Any]) -> Any:
    out = show.table("", "BF16", "quantized", "change")
    change = c["perplexity"] / c["perplexity_bf16"] - 1
    out.add_row("perplexity", f"{c['perplexity_bf16']:.3f}", f"{c['perplexity']:.3f}", f"{change:+.2%}")
    out.add_row("KL divergence (nats/token)", "0", f"{c['kl']:.5f}", "")
    out.add_row("top-1 agreement", "100%", f"{c['top1']:.1%}", "")
    out.add_row("bytes of weights", show.size(c["bytes_bf16"]), show.size(c["bytes"]), f"{c['bytes'] / c['bytes_bf16'] - 1:+.0%}")
    speed = c["tokens_per_second"] / c["tokens_per_second_bf16"]
    out.add_row("tokens/s", f"{c['tokens_per_second_bf16']:.1f}", f"{c['tokens_per_second']:.1f}", f"{speed:.2f}x")
    return out
