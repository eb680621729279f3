"""Measure a model's perplexity and print greedy samples.

Usage:
    python examples/train/evaluate.py examples/models/tiny-llama
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

CONTEXT = 256
EVAL_TEXT = Path(__file__).parents[1] / "models" / "eval.txt"
PROMPTS = ("The following exceptions are", "Return the", "The class statement")


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: torch.Tensor, context: int = CONTEXT) -> float:
    """Return the perplexity over windows that do not overlap.

    The first token of each window is not scored, and an incomplete last window is left out.

    Args:
        model: A causal language model. It is left in evaluation mode.
        tokens: Token ids, one dimension.
        context: The window length, which is also the stride.
    """
    model.eval()
    rows = tokens[: len(tokens) // context * context].view(-1, context)
    total, count = 0.0, 0
    for batch in rows.split(16):
        logits = model(input_ids=batch, use_cache=False).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        )
        total += losses.item()
        count += batch[:, 1:].numel()
    return math.exp(total / count)


def main() -> None:
    """Evaluate the model in the given directory."""
    parser = argparse.ArgumentParser(description="Perplexity and greedy samples of a model.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, default=EVAL_TEXT)
    parser.add_argument("--prompt", action="append", help="may be repeated")
    args = parser.parse_args()
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    tokens = torch.tensor(tokenizer(args.text.read_text("utf-8"), verbose=False)["input_ids"])
    print(f"perplexity {perplexity(model, tokens):.3f} over {len(tokens)} tokens")
    for prompt in args.prompt or PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
        print("---\n" + tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
