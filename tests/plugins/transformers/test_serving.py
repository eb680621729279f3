"""Continuous batching and the server of Transformers, over quantized models."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from urllib.request import urlopen

import openai
import pytest
import torch
from core_models import DENSE, MOE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
)

from quantport_transformers import QuantportConfig
from quantport_transformers.__main__ import main

PROMPTS = ([1, 5, 9, 3], [7, 2], [4, 4, 8, 10, 12, 3, 9])


GREEDY = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=-1)
CACHE = ContinuousBatchingConfig(num_blocks=16, block_size=32, max_batch_tokens=64)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("folder", "scheme"), [(DENSE, "int8_weight_only"), (DENSE, "mxfp4"), (MOE, "fp8_weight_only")]
)
def test_requests_of_a_continuous_batch_get_the_tokens_that_they_get_alone(folder, scheme):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", quantization_config=QuantportConfig(scheme)
    )
    alone = [
        model.generate(torch.tensor([ids]), generation_config=GREEDY)[0, len(ids) :].tolist()
        for ids in PROMPTS
    ]
    batch = model.generate_batch(
        inputs=list(PROMPTS), generation_config=GREEDY, continuous_batching_config=CACHE, progress_bar=False
    )
    assert [out.generated_tokens for out in batch.values()] == alone


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def serve(tmp_path):
    """Starts a server, and stops it."""
    started = []

    def start(model, *options):
        port = free_port()
        command = [sys.executable, "-m", "quantport_transformers", "serve", str(model), "--port", str(port)]
        log = (tmp_path / "log").open("w+")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=environment)
        started.append((process, log))
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        for _ in range(600):
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as answer:
                assert answer.status == 200
                return client
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        raise AssertionError((tmp_path / "log").read_text())

    yield start
    for process, log in started:
        process.kill()
        process.wait()
        log.close()


def test_a_server_answers_with_the_tokens_of_generate(serve):
    config = {"scheme": "int8", "ignore": ["*.down_proj"]}
    client = serve(DENSE, "--quantization", json.dumps(config))
    prompt = "The capital of"
    answer = client.completions.create(model=str(DENSE), prompt=prompt, max_tokens=6, temperature=0)
    tokenizer = AutoTokenizer.from_pretrained(DENSE)
    model = AutoModelForCausalLM.from_pretrained(
        DENSE, dtype="auto", quantization_config=QuantportConfig(**config)
    )
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert answer.choices[0].text == tokenizer.decode(out, skip_special_tokens=True)
    assert answer.usage.completion_tokens == len(out)


@pytest.mark.parametrize(
    ("asked", "said"),
    [("int9", "scheme 'int9'"), ("{scheme: int8}", "no JSON"), ('{"schem": "int8"}', "schem")],
)
def test_what_is_no_configuration_is_refused_before_a_model_is_loaded(asked, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quantport_transformers", "serve", "nowhere", "--quantization", asked])
    with pytest.raises(SystemExit) as caught:
        main()
    assert all(part in str(caught.value) for part in ("asked: ", said, "found: ", "try: "))
