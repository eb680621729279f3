"""Building fills what no checkpoint has, and nothing else; a load takes time by its tensors, not by their
square.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
import transformers
from core_models import DENSE, MOE, same_bits
from test_building import MODELS, config_of

import quantport
from quantport.errors import WeightError
from quantport.loading import load_model, prepare, quantize_checkpoint
from quantport.loading.build_context import building
from quantport.loading.executor import SHARES, TOGETHER, Gate, Task, run_tasks
from quantport.loading.fill_model import ModelFiller
from quantport.loading.skeleton import _without_weights


def built(name):
    with building(), _without_weights(transformers.PreTrainedModel):
        return getattr(transformers, name)._from_config(config_of(name), dtype=torch.bfloat16)


@pytest.mark.parametrize("name", MODELS)
def test_buffers_are_those_of_transformers(name):
    expected = getattr(transformers, name)._from_config(config_of(name), dtype=torch.bfloat16)
    found = built(name)
    assert all(p.is_meta for p in found.parameters())
    buffers = dict(expected.named_buffers())
    assert list(dict(found.named_buffers())) == list(buffers)
    for key, buffer in found.named_buffers():
        assert buffer.dtype is buffers[key].dtype, key
        assert same_bits(buffer, buffers[key]), key


def test_a_weight_that_nobody_fills_needs_no_compiler():
    """Torch imports it to fill a tensor on meta: 75 MiB beside a model."""
    code = """
import sys, torch, quantport
from torch import nn
from quantport.loading.build_context import building

before = set(sys.modules)
with building():
    made = [nn.Linear(64, 64), nn.Embedding(64, 64), nn.Bilinear(8, 8, 8)]
    direct = nn.Embedding(64, 64).weight.uniform_()
assert direct.is_meta and all(p.is_meta for m in made for p in m.parameters())
assert not {"sympy", "torch._dynamo"} & (set(sys.modules) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_real_tensor_is_filled_meanwhile():
    with building():
        buffer = torch.empty(1000, device="cpu").normal_()
        torch.nn.init.uniform_(other := torch.empty(1000, device="cpu"), 2, 3)
    assert 0.8 < buffer.std() < 1.2
    assert 2 <= other.min() < other.max() <= 3


def spied(name, monkeypatch):
    """The class that fills the modules of a model, and a list of those that it fills from now on."""
    base = next(c for c in getattr(transformers, name).__mro__ if "_init_weights" in vars(c))
    filled = []
    real = base._init_weights

    def spy(self, module):
        filled.append(module)
        real(self, module)

    monkeypatch.setattr(base, "_init_weights", spy)
    return base, filled


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3MoeForCausalLM", "T5ForConditionalGeneration"])
def test_weights_are_not_filled(name, monkeypatch):
    base, filled = spied(name, monkeypatch)
    built(name)
    assert all(isinstance(module, base) or list(module.buffers()) for module in filled)
    assert not any(type(module) is torch.nn.Linear for module in filled)
    filled.clear()
    getattr(transformers, name)._from_config(config_of(name))
    assert any(type(module) is torch.nn.Linear for module in filled), "the spy sees what it must"


@pytest.mark.parametrize(
    ("path", "name"), [(DENSE, "LlamaForCausalLM"), (MOE, "Qwen3MoeForCausalLM")], ids=["dense", "moe"]
)
def test_a_load_fills_none_either(path, name, monkeypatch):
    _, filled = spied(name, monkeypatch)
    quantport.load(path, "int8")
    assert not any(type(module) is torch.nn.Linear for module in filled)


@pytest.mark.parametrize("call", [quantport.load, quantize_checkpoint], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("home", "step"), [(load_model, "build"), (prepare, "make_plan"), (prepare, "tied_groups")]
)
def test_no_garbage_is_looked_for_among_fresh_modules(home, step, call, tmp_path, monkeypatch):
    looked, real = [], getattr(home, step)
    monkeypatch.setattr(home, step, lambda *a, **k: looked.append(gc.isenabled()) or real(*a, **k))
    place = () if call is quantport.load else (tmp_path / "out",)
    call(DENSE, *place, "int8")
    assert (looked, gc.isenabled()) == ([False], True)


@pytest.mark.parametrize("call", [quantport.load, quantize_checkpoint], ids=lambda f: f.__name__)
def test_no_garbage_is_looked_for_among_fresh_tasks(call, tmp_path, monkeypatch):
    looked, tasks = [], ModelFiller.tasks
    monkeypatch.setattr(ModelFiller, "tasks", lambda *to: looked.append(gc.isenabled()) or tasks(*to))
    place = () if call is quantport.load else (tmp_path / "out",)
    call(DENSE, *place, "int8")
    assert (looked, gc.isenabled()) == ([False], True)


def test_another_thread_fills_its_weights_meanwhile():
    made = []

    def other():
        made.append(transformers.LlamaForCausalLM(config_of("LlamaForCausalLM")))

    with building(), _without_weights(transformers.PreTrainedModel):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    weight = made[0].model.embed_tokens.weight
    assert not weight.is_meta
    assert 0.015 < weight.std() < 0.025, "the range of the configuration; torch's own is 1"


@pytest.mark.parametrize("workers", [1, 3])
def test_small_tasks_take_turns_together(workers, monkeypatch):
    """As many turns for eight thousand as for one thousand, in order, and each is reported."""
    turns, admit = [], Gate.admit
    monkeypatch.setattr(Gate, "admit", lambda self, turn: turns.append(len(turn)) or admit(self, turn))

    def run(count, need, budget=None):
        turns.clear()
        ran, told = [], []
        tasks = [Task(str(i), 1, partial(ran.append, i), need) for i in range(count)]
        run_tasks(tasks, lambda done, _, name: told.append((done, name)), workers, budget)
        assert sorted(ran) == list(range(count)) == sorted(int(name) for _, name in told)
        assert [done for done, _ in told] == list(range(1, count + 1))
        return len(turns)

    for count in (1000, 8000):
        assert SHARES * workers <= run(count, 1) <= SHARES * workers + 10
    assert run(SHARES, 1) == SHARES, "few take turns alone"
    assert run(1000, TOGETHER) == 1000, "so do large ones"
    assert run(1000, 10, budget=40 * workers) >= 250, "and where many are a large part of the budget"


@pytest.mark.parametrize("error", [WeightError("a", "b", "c"), KeyboardInterrupt()], ids=repr)
def test_what_ends_a_load_ends_the_turn_that_it_comes_in(error):
    ran = []

    def fails():
        raise error

    tasks = [Task(str(i), 1, fails if i == 2 else partial(ran.append, i)) for i in range(SHARES * 100)]
    with pytest.raises(type(error)):
        run_tasks(tasks, workers=1)
    turn = set(range(100))  # others may begin before the error is seen
    assert turn & set(ran) == {0, 1}


def test_a_load_says_what_it_does_before_the_first_tensor():
    seen = []
    quantport.load(DENSE, "int8", progress=lambda *args: seen.append(args))
    before = [name for done, _, name in seen if not done]
    assert before == ["reading headers", "importing Transformers", "building the model", "choosing kernels"]
    assert all(total > 0 for _, total, _ in seen), "nobody divides by 0"
