"""A compiled decode step: the tokens of an eager one, one graph for all lengths, and what is refused."""

from __future__ import annotations

import pytest
import torch
from core_models import DENSE, MOE
from torch import nn
from torch._dynamo.utils import counters

import quantport
from quantport.errors import ConfigError, UnsupportedError

pytest.importorskip("transformers")
IDS = torch.arange(5, 25).view(1, 20) * 37 % 2000


def generate(model, ids=IDS, tokens=8):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
    )


def traced(model, max_length=64):
    """Compiled by a backend that only traces."""
    torch._dynamo.reset()
    counters.clear()
    compiled = quantport.compile_decode(model, max_length)
    assert compiled is model
    model.generation_config.compile_config.backend = "aot_eager"
    model.generation_config.compile_config.options = None
    return model


@pytest.mark.parametrize("scheme", ["int8", "int4_weight_only"])
@pytest.mark.parametrize("path", [DENSE, MOE], ids=lambda p: p.name)
def test_the_same_tokens_from_one_graph_for_every_length(path, scheme):
    model = quantport.load(path, scheme, dtype=torch.float32)  # in BF16 two of the tokens have equal logits
    eager = [generate(model), generate(model, IDS[:, :7], 20)]
    traced(model)
    compiled = [generate(model), generate(model, IDS[:, :7], 20)]
    assert all(map(torch.equal, compiled, eager))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch, within its own code
def test_the_same_tokens_from_machine_code():
    torch._dynamo.reset()
    model = quantport.compile_decode(quantport.load(DENSE, "int8"))
    compiled = generate(model, tokens=40)
    model.generation_config.compile_config = None
    model.generation_config.disable_compile = True
    assert torch.equal(generate(model, tokens=40), compiled)


def test_a_longer_text_than_the_cache_holds_is_generated_too():
    model = quantport.load(DENSE, "int8")
    eager = generate(model)
    assert torch.equal(generate(traced(model, 10)), eager)


def test_no_compiler_is_said_before_anything_runs(monkeypatch):
    model = quantport.load(DENSE, "int8")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(UnsupportedError) as caught:
        quantport.compile_decode(model)
    assert "no C++ compiler" in caught.value.found
    assert "CXX" in caught.value.suggestion
    assert model.generation_config.cache_implementation is None


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: nn.Linear(2, 2), "does not generate"),
        (lambda: quantport.load(DENSE, config={"scheme": "int8", "kv_cache_dtype": "fp8"}), "quantized"),
    ],
)
def test_what_does_not_become_one_graph_is_refused(make, found):
    with pytest.raises(UnsupportedError) as caught:
        quantport.compile_decode(make())
    assert found in caught.value.found


@pytest.mark.parametrize("length", [0, -1, 2.0, True])
def test_a_length_is_a_number_of_tokens(length):
    with pytest.raises(ConfigError):
        quantport.compile_decode(nn.Linear(2, 2), length)
