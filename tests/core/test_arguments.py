"""Arguments of the Python calls: `plan` takes those of `load`; no module, or none made, is an error."""

from __future__ import annotations

import inspect

import pytest
import torch
from core_models import DENSE, Moe, Tiny, made, write
from core_references import check_parts
from torch import nn

import quantport
from quantport.errors import CheckpointError, ConfigError, QuantportError, WeightError
from quantport.loading import update_weight
from quantport.model.roles import SkipCode


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tiny") / "c", made())


def test_plan_takes_every_argument_of_load():
    ours, theirs = (inspect.signature(f).parameters for f in (quantport.plan, quantport.load))
    assert list(ours) == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs)
    assert all(ours[name].kind == theirs[name].kind for name in theirs)


def test_plan_and_load_with_the_same_arguments_say_the_same(tiny):
    seen = []
    options = {
        "config": {"ignore": ["down"]},
        "device": "cpu",
        "model": Tiny,
        "dtype": torch.bfloat16,
        "num_tokens": 7,
        "fallback": "reference",
        "progress": lambda *_: seen.append(1),
        "workers": 1,
        "budget": "100MB",
    }
    plan = quantport.plan(tiny, "int8", **options)
    assert not seen
    assert plan == quantport.load(tiny, "int8", **options).quantport_plan
    assert quantport.plan(path_or_id=tiny).budget


def test_a_plan_knows_the_modules_that_a_factory_makes(tiny):
    class Mine(nn.Linear):
        pass

    def factory():
        model = Tiny()
        model.up = Mine(32, 129)
        return model

    assert quantport.plan(tiny, "int8").by_layer["up"].requested_scheme == "int8"
    step = quantport.plan(tiny, "int8", model=factory).by_layer["up"]
    assert step.skip_reason.code is SkipCode.OTHER_LINEAR
    assert (
        quantport.load(tiny, "int8", model=factory).quantport_plan.by_layer["up"].skip_reason
        == step.skip_reason
    )


def raising():
    raise ValueError("no such size")


def of_arguments(size):
    return nn.Linear(size, size)


@pytest.mark.parametrize("call", [quantport.load, quantport.plan], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("model", "named"),
    [
        (Moe(), ["a Moe that is made already", "quantize_"]),
        (nn.Linear(2, 2), ["a Linear that is made already"]),
        ("LlamaForCausalLM", ["a str", "'LlamaForCausalLM'"]),
        ({"a": 1}, ["a dict"]),
        (raising, ["ValueError: no such size"]),
        (of_arguments, ["TypeError", "takes no arguments"]),
        (lambda: None, ["NoneType"]),
        (lambda: Tiny, ["returned a type"]),
    ],
)
def test_what_makes_no_module_is_refused(tiny, call, model, named):
    with pytest.raises(CheckpointError) as caught:
        call(tiny, "int8", model=model)
    check_parts(caught.value, "model=", *named)


def test_an_interrupt_in_a_factory_is_one(tiny):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantport.load(tiny, "int8", model=interrupted)


@pytest.mark.parametrize("value", [None, "path/to/model", DENSE, Tiny, {"a": torch.ones(2, 2)}, 3])
@pytest.mark.parametrize(
    "call",
    [
        lambda value, folder: quantport.quantize_(value, "int8"),
        lambda value, folder: quantport.save(value, folder / "out"),
        lambda value, folder: update_weight(value, "", torch.ones(2, 2)),
    ],
    ids=["quantize_", "save", "update_weight"],
)
def test_what_is_no_module_is_refused(call, value, tmp_path):
    with pytest.raises((ConfigError, WeightError)) as caught:
        call(value, tmp_path)
    check_parts(caught.value, type(value).__name__)
    assert not list(tmp_path.iterdir())


def test_a_weight_of_a_layer_that_is_not_quantized_is_not_updated():
    with pytest.raises(WeightError, match="a Linear"):
        update_weight(nn.Linear(2, 2), "", torch.ones(2, 2))


@pytest.mark.parametrize("value", [None, 3, ["a"], object()], ids=lambda v: type(v).__name__)
def test_what_is_no_checkpoint_is_refused(value):
    for call in (quantport.load, quantport.plan):
        with pytest.raises(QuantportError) as caught:
            call(value)
        check_parts(caught.value, type(value).__name__)
