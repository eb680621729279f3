"""Runs in the environment of vLLM (``ci/vllm``): loads checkpoints, and writes the log-probability that each
gives every token of a text after the first.

    python of_vllm.py OUT.json TOKENS.json CHECKPOINT...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(out: str, tokens: str, *checkpoints: str) -> None:
    """Writes ``{checkpoint: [log-probability, ...]}``, or the error in place of the list."""
    from vllm import LLM, SamplingParams

    ids = json.loads(Path(tokens).read_text(encoding="utf-8"))
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    found: dict[str, list[float]] = {}
    for checkpoint in checkpoints:
        model = LLM(checkpoint, skip_tokenizer_init=True, enforce_eager=True, max_model_len=len(ids) + 1)
        (answer,) = model.generate([{"prompt_token_ids": ids}], params)
        pairs = zip(ids[1:], answer.prompt_logprobs[1:], strict=True)
        found[checkpoint] = [given[token].logprob for token, given in pairs]
        del model
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
