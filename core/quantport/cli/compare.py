"""Measures a quantized model against its 16-bit original: quality on the same windows of text, speed in
turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantport.errors import ConfigError
from quantport.loading.kv_caches import default_of

WINDOW = 256  # tokens: the context that perplexity is measured in
ROUNDS = 3  # of timed generation for each model, in turns


def cut(ids: list[int], count: int, positions: int | None) -> Tensor:
    """Cuts tokens into at most ``count`` full windows ``[windows, length]``, no longer than the model's
    positions.

    Every window starts without context, as in the usual protocol with stride = window.
    """
    length = min(WINDOW, positions or WINDOW)
    found = min(len(ids) // length, count)
    if not found:
        raise ConfigError(
            "--compare", f"a text of {len(ids)} tokens", f"a text of at least {length} tokens: --text FILE"
        )
    return torch.tensor(ids[: found * length], dtype=torch.int64, device="cpu").view(found, length)


@torch.no_grad()
def quality(
    model: Any, base: Any, windows: Tensor, report: Callable[[int, int, str], None]
) -> dict[str, float]:
    """Perplexity of both models, mean KL(base || model) in nats per token, and the share of equal top-1
    tokens.

    One window at a time, so that memory holds the logits of one window only. A model with a quantized KV
    cache attends to keys and values as they read back from it.

    Args:
        model: The quantized model.
        base: Its 16-bit original.
        windows: Tokens ``[windows, length]`` on the models' device.
        report: Called with (windows done, windows, "").
    """
    sums = torch.zeros(4, dtype=torch.float64, device="cpu")
    for i, window in enumerate(windows):
        found, expected = (_log_probs(m, window) for m in (model, base))
        target = window[1:, None]
        divergence = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="none").sum(-1)
        same = (found.argmax(-1) == expected.argmax(-1)).float()
        parts = (-found.gather(-1, target), -expected.gather(-1, target), divergence, same)
        sums += torch.stack([p.double().sum().cpu() for p in parts])
        report(i + 1, len(windows), "")
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    nll, base_nll, kl, top1 = (sums / tokens).tolist()
    return {
        "perplexity": _exp(nll),
        "perplexity_bf16": _exp(base_nll),
        "kl": kl,
        "top1": top1,
        "tokens_scored": tokens,
        "window": windows.shape[1],
    }


def _log_probs(model: Any, window: Tensor) -> Tensor:
    """Of every token but the first: fp32 ``[length - 1, vocabulary]``."""
    default = default_of(model)
    cache = {"past_key_values": default.fresh(), "use_cache": True} if default else {}
    out: Tensor = model(window[None], **cache).logits[0, :-1].float().log_softmax(-1)
    return out


def _exp(value: float) -> float:
    # of a large value: infinity, where math.exp raises
    return torch.tensor(value, dtype=torch.float64, device="cpu").exp().item()


@torch.no_grad()
def generate(model: Any, ids: Tensor, tokens: int, least: int = 0) -> Tensor:
    """Greedy tokens ``[1, prompt + new]``; all settings are explicit, so that two models are asked for the
    same work.
    """
    settings: Mapping[str, Any] = {
        "max_new_tokens": tokens,
        "min_new_tokens": least,
        "do_sample": False,
        "num_beams": 1,
    }
    out: Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **settings
    )
    return out


def timed(model: Any, ids: Tensor, tokens: int, least: int = 0) -> tuple[Tensor, float]:
    """Greedy tokens, and how many of them a second made, prompt included in the time."""
    start = time.perf_counter()
    out = generate(model, ids, tokens, least)
    count = out.shape[1] - ids.shape[1]
    out = out.cpu()  # waits for the device
    return out, count / (time.perf_counter() - start)


def warm_up(model: Any, ids: Tensor, tokens: int) -> None:
    """Generates a little, so that what is compiled, packed or allocated at the first call is."""
    generate(model, ids, min(4, tokens))


def rates(models: Mapping[str, Any], ids: Tensor, tokens: int, rounds: int = ROUNDS) -> dict[str, float]:
    """Tokens per second of each model: warmed up, then in turns, the median of the rounds. None stops
    early.
    """
    for model in models.values():
        warm_up(model, ids, tokens)
    found: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            found[name].append(timed(model, ids, tokens, least=tokens)[1])
    return {name: statistics.median(values) for name, values in found.items()}
