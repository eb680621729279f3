"""Reads a GGUF file with llama.cpp, in whose environment this runs: a JSON object on stdin, one on stdout."""

import json
import sys
from itertools import islice

import llama_cpp

asked = json.load(sys.stdin)
llm = llama_cpp.Llama(asked["file"], n_ctx=256, n_threads=2, logits_all=True, verbose=False)
llm.eval(asked["ids"])
answer = {
    "tokens": llm.tokenize(asked["text"].encode(), add_bos=False, special=True),
    "logits": llm.scores[: len(asked["ids"])].tolist(),
    "bos": llm.token_bos(),
    "eos": llm.token_eos(),
}
llm.reset()
answer["greedy"] = list(islice(llm.generate(asked["ids"], temp=0.0), asked["count"]))
json.dump(answer, sys.stdout)
