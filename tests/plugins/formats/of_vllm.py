"""Runs in the environment of vLLM: loads a checkpoint, and writes the log-probability that it gives each
token of a text after the first.

    python of_vllm.py OUT.json TOKENS.json CHECKPOINT DTYPE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(out: str, tokens: str, checkpoint: str, dtype: str) -> None:
    """Writes a list of log-probabilities."""
    from vllm import LLM, SamplingParams

    ids = json.loads(Path(tokens).read_text(encoding="utf-8"))
    settings = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": len(ids) + 1}
    model = LLM(checkpoint, dtype=dtype, **settings)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    (answer,) = model.generate([{"prompt_token_ids": ids}], params)
    pairs = zip(ids[1:], answer.prompt_logprobs[1:], strict=True)
    found = [given[token].logprob for token, given in pairs]
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
