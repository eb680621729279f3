"""Quality and size of quantized KV caches: error of the attention output, perplexity, bytes per token, time of a step.

Writes ``benchmarks/results/kv_cache.md`` and, alone with ``--steps``, ``kv_cache_step-ARCH.md``. Beside ours: the
quantized caches of Transformers, where they run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import ROOT, interleaved, markdown, write
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, QuantizedCache
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging

from quantport import kv_cache
from quantport.cli import compare
from quantport.plugins.registry import default_registry

MODELS = ("tiny-llama", "tiny-qwen3-moe")
OURS = ("auto", "fp8_e4m3", "fp8_e5m2", "int8", "int4")
PEERS = {"fp8": {}, "quanto": {"nbits": 4}, "hqq": {"nbits": 4, "axis_key": 1, "axis_value": 1}}
BOUND = {"fp8_e4m3": 1.01, "int8": 1.005}
WINDOWS = 32
STEP = 64  # tokens of a window go through the cache in pieces of this size, so that old pieces are read back from it
HEADS, KV_HEADS, HEAD = 32, 8, 128  # of a step: those of Llama 3.1 8B
COLD_BYTES = 1 << 28  # of BF16 keys and values in all layers of a step
Make = Callable[[], Any]


def makers(model: Any) -> dict[str, Make]:
    """Name -> function that makes an empty cache: BF16, ours, and those of Transformers that can be made here."""
    config = model.config
    out: dict[str, Make] = {"BF16": lambda: DynamicCache(config=config)}
    out |= {f"quantport {name}": partial(kv_cache, model, name) for name in OURS if name != "auto"}
    for backend, options in PEERS.items():
        make = partial(QuantizedCache, backend, config, **options)
        try:
            make()
        except (ImportError, ValueError):  # not installed, or not in this version
            continue
        out[f"Transformers {backend}"] = make
    return out


def perplexity(model: Any, windows: Tensor, make: Make) -> float:
    """Of windows ``[n, length]``, all at once, in pieces through one cache."""
    cache = make()
    with torch.no_grad():
        logits = [
            model(piece, past_key_values=cache, use_cache=True).logits.float()
            for piece in windows.split(STEP, dim=1)
        ]
    scores = torch.cat(logits, dim=1)[:, :-1]
    return cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten()).exp().item()


def attention_error(make: Make, queries: Tensor, keys: Tensor, values: Tensor, layer: int = 0) -> float:
    """Relative error of the attention output of the last quarter of the queries, against 16-bit keys and values."""
    cache = make()
    for k, v in zip(keys.split(STEP, dim=2), values.split(STEP, dim=2), strict=True):
        cached = cache.update(k, v, layer)
    count = keys.shape[2] // 4
    mask = torch.ones(count, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - count)
    out, expected = (
        scaled_dot_product_attention(
            queries[:, :, -count:].float(), k.float(), v.float(), attn_mask=mask, enable_gqa=True
        )
        for k, v in (cached, (keys, values))
    )
    return ((out - expected).norm() / expected.norm()).item()


def recorded(model: Any, window: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of every layer of a model on a window, after the rotary embedding."""
    from transformers import AttentionInterface

    states = []

    def spy(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        states.append((query, key, value))
        out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("spy", spy)
    before = model.config._attn_implementation
    model.set_attn_implementation("spy")
    with torch.no_grad():
        model(window, use_cache=False)
    model.set_attn_implementation(before)
    return states


def synthetic(outliers: float, growth: float, width: int = 128, tokens: int = 256) -> list[Tensor]:
    """Gaussian states: 3 channels of every key are larger, as in large models, and values grow from token to token."""
    queries, keys, values = torch.randn(3, 1, 4, tokens, width, generator=torch.Generator().manual_seed(0))
    keys[..., [7, 40, 99]] *= outliers
    queries[..., [7, 40, 99]] /= outliers  # scores stay of order one, as after training
    values *= torch.linspace(1, growth, tokens)[:, None]
    return [x.bfloat16() for x in (queries, keys, values)]


def steps(tokens: int) -> list[list[object]]:
    """Appending a token to one layer and attending to all of them; layers are taken in turn, cold in cache."""
    shape = (1, KV_HEADS, tokens, HEAD)
    config = LlamaConfig(
        hidden_size=HEAD * HEADS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=max(2, COLD_BYTES // (4 * KV_HEADS * tokens * HEAD)),
    )
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = HEADS // KV_HEADS, True
    states, one = torch.randn(2, *shape).bfloat16(), torch.randn(1, KV_HEADS, 1, HEAD).bfloat16()
    query = torch.randn(1, HEADS, 1, HEAD).bfloat16()
    caches = {"BF16, DynamicCache": DynamicCache(config=config)}
    for name in OURS:
        for size in (None, tokens + 1) if name != "auto" else (tokens + 1,):
            label = "BF16" if name == "auto" else f"quantport {name}"
            caches[label + (", fixed size" if size else "")] = kv_cache(config, name, max_length=size)
    caches["FP32, fixed size"] = kv_cache(config, "auto", max_length=tokens + 1)
    dtypes = {name: torch.float32 if name.startswith("FP32") else torch.bfloat16 for name in caches}
    for name, cache in caches.items():
        for layer in cache.layers:
            layer.update(*states.to(dtypes[name]))

    def step(layers: Sequence[Any], dtype: torch.dtype) -> Callable[[int], object]:
        q, new = query.to(dtype), one.to(dtype)

        def call(turn: int) -> None:
            layer = layers[turn % len(layers)]
            sdpa_attention_forward(module, q, *layer.update(new, new), None)
            layer.crop(-1)

        return call

    memory = torch.ones(COLD_BYTES // 8, dtype=torch.int64)
    parts = memory.split(1 << 20)
    calls: dict[str, Callable[[int], object]] = {
        name: step(c.layers, dtypes[name]) for name, c in caches.items()
    }
    calls["memory"] = lambda turn: parts[turn % len(parts)].max()
    with torch.no_grad():
        times = interleaved(calls, rounds=15, seconds=0.03)
    per_byte = times.pop("memory") / (8 << 20)
    rows: list[list[object]] = []
    for name, seconds in times.items():
        layer = caches[name].layers[0]
        limit = per_byte * (layer.keys.nbytes + layer.values.nbytes)
        ratio = times["BF16, DynamicCache"] / seconds
        mark = (" ✅" if ratio >= 1.2 else " ❌") if tokens == 4096 and "quantport" in name else ""
        fixed = times["BF16, fixed size"] / seconds
        rows.append(
            [
                tokens,
                name,
                f"{1e3 * seconds:.2f}",
                f"{ratio:.2f}x{mark}",
                f"{fixed:.2f}x",
                f"{limit / seconds:.0%}",
            ]
        )
    return rows


def stored_bytes(cache: Any) -> int:
    """Bytes of every tensor that a cache holds, ours or another's."""
    seen: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            parts = [getattr(value, name) for name in ("_data", "_scale", "_shift") if hasattr(value, name)]
            seen.update({p.data_ptr(): p.nbytes for p in parts or [value]})
        elif isinstance(value, tuple | list):
            for item in value:
                walk(item)

    for layer in cache.layers:
        for name in ("keys", "values", "_quantized_keys", "_quantized_values"):
            walk(getattr(layer, name, None))
    return sum(seen.values())


def measure(name: str) -> list[list[object]]:
    """The rows of one model."""
    path = ROOT / "examples" / "models" / name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    text = (path.parent / "eval.txt").read_text(encoding="utf-8")
    windows = compare.cut(AutoTokenizer.from_pretrained(path)(text, verbose=False).input_ids, WINDOWS, None)
    states, synthetics = recorded(model, windows[:8]), (synthetic(20, 1), synthetic(1, 8))
    rows: list[list[object]] = []
    base = 0.0
    for kind, make in makers(model).items():
        ppl = perplexity(model, windows, make)
        base = base or ppl
        errors = [attention_error(make, *qkv) for qkv in states]
        cache = make()
        with torch.no_grad():
            model(windows[:1], past_key_values=cache, use_cache=True)
        limit = BOUND.get(kind.removeprefix("quantport "))
        mark = "" if limit is None else " ✅" if ppl / base <= limit else " ❌"
        rows.append(
            [
                name,
                kind,
                f"{sum(errors) / len(errors):.4f}",
                f"{max(errors):.4f}",
                *(f"{attention_error(make, *s):.4f}" for s in synthetics),
                f"{ppl:.3f}",
                f"{ppl / base - 1:+.2%}{mark}",
                f"{stored_bytes(cache) / windows.shape[1]:.0f}",
            ]
        )
    return rows


def main() -> None:
    logging.disable_progress_bar()
    rows = [row for name in MODELS for row in measure(name)]
    columns = [
        "model",
        "cache",
        "attention error, mean",
        "worst layer",
        "outlier keys",
        "growing values",
        "ppl",
        "change",
        "bytes/token",
    ]
    notes = [
        f"Text examples/models/eval.txt in {WINDOWS} windows of 256 tokens, BF16 weights, through the cache in pieces of {STEP} tokens.",
        "Attention error: relative, of the attention output for the last quarter of the tokens, against 16-bit keys and values;",
        "of the model's own states; of Gaussian states with 3 of 128 key channels 20 times larger; of values that grow by 8 from the first",
        "token to the last. Bytes per token after 256 tokens;",
        "heads here have 32 elements, of which a scale is a larger part than of 128. The caches of Transformers return the first piece as it",
        "came, and those for integers keep their last 128 tokens in 16 bits. Must reach: fp8_e4m3 within 1% of BF16, int8 within 0.5%.",
    ]
    table = markdown("Quantized KV caches", columns, rows, notes)
    write("kv_cache.md", table)


def measure_steps() -> None:
    """Writes the page of this architecture."""
    columns = ["tokens", "cache", "ms", "of DynamicCache", "of BF16, fixed size", "of the limit"]
    notes = [
        f"One token appended to a layer of {KV_HEADS} heads of {HEAD} elements, and {HEADS} heads of queries attending to all of them through",
        "Transformers' SDPA; layers taken in turn, cold in cache. The limit: reading what is stored once, at the speed at which torch reads",
        "memory in the same run. BF16 of fixed size is written in place, DynamicCache copies itself. Must reach: 1.2x at 4096 tokens.",
    ]
    arch = default_registry().device("cpu").arch.name
    rows = [row for tokens in (1024, 4096) for row in steps(tokens)]
    write(
        f"kv_cache_step-{arch}.md",
        markdown(f"One step with a quantized KV cache, {arch}", columns, rows, notes),
    )


if __name__ == "__main__":
    if sys.argv[1:] != ["--steps"]:
        main()
    measure_steps()
