"""Train the two example models from scratch on the documentation bundled with Python.

Usage:
    python examples/train/train.py --model dense --out examples/models/tiny-llama
    python examples/train/train.py --model moe --out examples/models/tiny-qwen3-moe
"""

from __future__ import annotations

import argparse
import math
import platform
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from checkpoint import TRAIN_CONTEXT, VOCAB_SIZE, build_model, save, train_tokenizer
from corpus import RECORDED_PYTHON, RECORDED_SHA256, Corpus, build_corpus
from evaluate import CONTEXT, perplexity

THREADS = 2
SEED = 20240229


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one training run."""

    name: str
    steps: int
    batch: int = 4
    learning_rate: float = 2.5e-3
    warmup: int = 100
    weight_decay: float = 0.1


RECIPES = {
    "dense": Recipe("tiny-llama", steps=1020),
    "moe": Recipe("tiny-qwen3-moe", steps=2000, batch=2, learning_rate=2e-3),
}


def encode(tokenizer: transformers.PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Return one token stream in which every document ends with the end token."""
    ids: list[int] = []
    for row in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
        ids.extend(row)
        ids.append(0)
    return torch.tensor(ids)


def batches(stream: torch.Tensor, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield batches for ever, each epoch with a new offset and order of windows."""
    while True:
        offset = int(torch.randint(TRAIN_CONTEXT, (1,), generator=generator))
        rows = (len(stream) - offset) // TRAIN_CONTEXT
        windows = stream[offset : offset + rows * TRAIN_CONTEXT].view(rows, TRAIN_CONTEXT)
        order = torch.randperm(rows, generator=generator)
        for start in range(0, rows - batch + 1, batch):
            yield windows[order[start : start + batch]]


def train(
    model: transformers.PreTrainedModel,
    kind: str,
    recipe: Recipe,
    stream: torch.Tensor,
    valid: torch.Tensor,
) -> dict[str, float]:
    """Train with AdamW, linear warm-up and cosine decay.

    Returns:
        Numbers for the model card.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))

    def factor(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        done = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
        return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    source = batches(stream, recipe.batch, torch.Generator().manual_seed(SEED))
    extra = {"output_router_logits": True} if kind == "moe" else {}
    model.train()
    started, smooth, evaluated = time.monotonic(), 0.0, 0.0
    for step in range(1, recipe.steps + 1):
        rows = next(source)
        logits_and_aux = model(input_ids=rows, use_cache=False, **extra)
        loss = torch.nn.functional.cross_entropy(
            logits_and_aux.logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()
        )
        total = loss
        if kind == "moe":
            total = loss + balance_loss(model, logits_and_aux.router_logits)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        smooth = loss.item() if step == 1 else 0.98 * smooth + 0.02 * loss.item()
        if step % 200 == 0 or step == recipe.steps:
            pause = time.monotonic()
            seconds = pause - started - evaluated
            speed = step * recipe.batch * TRAIN_CONTEXT / seconds
            ppl = perplexity(model, valid)
            model.train()
            evaluated += time.monotonic() - pause
            print(
                f"step {step}/{recipe.steps} loss {smooth:.3f} valid ppl {ppl:.2f} {speed:.0f} "
                f"tokens/s {seconds:.0f} s",
                flush=True,
            )
    return {"loss": smooth, "valid": ppl, "speed": speed, "seconds": seconds}


def balance_loss(
    model: transformers.PreTrainedModel, router_logits: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Return the Switch-style load-balancing loss of the routers."""
    config = model.config
    scores = torch.cat([layer.flatten(0, -2) for layer in router_logits]).softmax(-1)
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(config.num_experts_per_tok).indices, 1)
    balance = (chosen.mean(0) * scores.mean(0)).sum() * config.num_experts
    return config.router_aux_loss_coef * balance


def unigram_perplexity(stream: torch.Tensor, evaluation: torch.Tensor) -> float:
    """Return the perplexity of an add-one unigram model over the evaluation tokens."""
    counts = Counter(stream.tolist())
    total = len(stream) + VOCAB_SIZE
    logs = [math.log((counts[t] + 1) / total) for t in evaluation.tolist()]
    return math.exp(-sum(logs) / len(logs))


def write_card(out: Path, recipe: Recipe, corpus: Corpus, numbers: dict[str, float]) -> None:
    """Write the model card."""
    epochs = recipe.steps * recipe.batch * TRAIN_CONTEXT / numbers["train_tokens"]
    out.joinpath("README.md").write_text(
        f"""# {recipe.name}

A small language model trained from scratch for the examples and tests of quantport.
It writes plausible sentences in the style of the Python documentation and knows nothing
else. Reproduce it with `examples/train/train.py`.

| | |
|---|---|
| Parameters | {numbers["parameters"]:.0f} |
| Training text | Python {platform.python_version()} documentation, docstrings and comments |
| SHA-256 of the training text | `{corpus.sha256()}` |
| Training tokens | {numbers["train_tokens"]:.0f} ({epochs:.1f} epochs) |
| Steps | {recipe.steps} of {recipe.batch} x {TRAIN_CONTEXT} tokens, seed {SEED} |
| Final training loss (smoothed, nats per token) | {numbers["loss"]:.3f} |
| Validation perplexity (FP32) | {numbers["valid"]:.2f} |
| Perplexity of `eval.txt` (BF16) | {numbers["eval"]:.3f} |
| Perplexity of `eval.txt`, unigram model | {numbers["unigram"]:.1f} |
| Versions | torch {torch.__version__}, transformers {transformers.__version__} |

Perplexity: windows of {CONTEXT} tokens that do not overlap, no context carried over, the
first token of each window not scored, the incomplete last window left out.

NOTICE: the training text is part of CPython, Copyright Python Software Foundation and
contributors, used under the PSF License Version 2.
""",
        encoding="utf-8",
    )


def main() -> None:
    """Train one model and write it to a directory."""
    parser = argparse.ArgumentParser(description="Train one of the example models.")
    parser.add_argument("--model", choices=sorted(RECIPES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="override the number of steps")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    recipe = RECIPES[args.model]
    if args.steps:
        recipe = replace(recipe, steps=args.steps, warmup=min(recipe.warmup, args.steps // 4))

    corpus = build_corpus()
    print(f"sha256 of the training text: {corpus.sha256()}")
    if corpus.sha256() != RECORDED_SHA256:
        warnings.warn(
            f"the training text differs from the recorded one (Python {RECORDED_PYTHON}); "
            "the model will differ slightly from the published one",
            stacklevel=1,
        )
    tokenizer = train_tokenizer(corpus)
    stream, valid = encode(tokenizer, corpus.train), encode(tokenizer, corpus.valid)
    evaluation = torch.tensor(tokenizer(corpus.evaluation, verbose=False)["input_ids"])
    model = build_model(args.model)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(stream)} training tokens, {len(evaluation)} eval tokens")
    numbers = train(model, args.model, recipe, stream, valid)
    save(model, tokenizer, args.out)
    saved = transformers.AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16)
    numbers["eval"] = perplexity(saved, evaluation)
    numbers["unigram"] = unigram_perplexity(stream, evaluation)
    numbers |= {"parameters": parameters, "train_tokens": len(stream)}
    write_card(args.out, recipe, corpus, numbers)
    print(f"eval ppl {numbers['eval']:.3f} (unigram {numbers['unigram']:.1f})")


if __name__ == "__main__":
    main()
