"""Reads a GGUF file with llama.cpp, in whose environment this runs: a JSON object on stdin, one on stdout."""

import json
import sys

import llama_cpp


def main() -> None:
    asked = json.load(sys.stdin)
    llm = llama_cpp.Llama(asked["file"], n_ctx=256, n_threads=2, logits_all=True, verbose=False)
    tokens = llm.tokenize(asked["text"].encode(), add_bos=False, special=True)
    llm.eval(asked["ids"])
    logits = llm.scores[: len(asked["ids"])].tolist()
    llm.reset()
    greedy: list[int] = []
    for token in llm.generate(asked["ids"], temp=0.0):
        greedy.append(token)
        if len(greedy) == asked["count"]:
            break
    answer = {
        "tokens": tokens,
        "logits": logits,
        "greedy": greedy,
        "bos": llm.token_bos(),
        "eos": llm.token_eos(),
    }
    json.dump(answer, sys.stdout)


main()
