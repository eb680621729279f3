"""What must not happen around a load: broken threads, silent no-ops, arguments that nobody checks."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import quantport
from quantport.checkpoint import save_tensors
from quantport.errors import QuantportError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return self.a(x)


@pytest.fixture
def folder(tmp_path):
    return save_tensors(tmp_path / "m", [("a.weight", torch.randn(32, 64).bfloat16())])


def test_loads_in_parallel(folder):
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: quantport.load(folder, "int8", model=Model), range(8)))
    x = torch.randn(2, 64).bfloat16()
    assert all(torch.equal(m(x), models[0](x)) for m in models)
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_other_threads_make_real_modules_meanwhile(folder):
    seen = []

    def factory():
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(lambda: nn.Linear(2, 2).weight.device.type).result())
        return Model()

    quantport.load(folder, "int8", model=factory)
    assert seen == ["cpu"]


def test_quantizing_again_is_refused_and_keeps_the_plan():
    model = Model().bfloat16()
    plan = quantport.quantize_(model, "int8")
    with pytest.raises(QuantportError, match="quantized already"):
        quantport.quantize_(model, "int8")
    assert model.quantport_plan is plan


def test_nothing_to_quantize_is_refused():
    with pytest.raises(QuantportError, match="no layer can be quantized"):
        quantport.quantize_(nn.Sequential(nn.ReLU()), "int8")


@pytest.mark.parametrize(
    "options",
    [
        {"num_tokens": 0},
        {"num_tokens": "1"},
        {"workers": 0},
        {"device": 0},
        {"dtype": torch.int8},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_arguments_are_checked(folder, options):
    with pytest.raises(QuantportError):
        quantport.load(folder, "int8", model=Model, **options)


def test_more_arguments_are_checked(folder):
    for call in (
        lambda: quantport.load(None),
        lambda: quantport.matrix(layer="lin"),
        lambda: quantport.plan(folder, num_tokens=-1),
    ):
        with pytest.raises(QuantportError):
            call()


def test_names_are_matched_without_case_and_schemes_by_value(folder):
    for scheme in ("INT8", "Int8", quantport.schemes["int8"]):
        assert quantport.plan(folder, scheme).quantized[0].requested_scheme == "int8"
    with pytest.raises(QuantportError, match="did you mean 'int8'"):
        quantport.plan(folder, "INT88")


def test_a_plan_prints_as_a_summary(folder):
    text = str(quantport.plan(folder, "int8"))
    assert "1 layers: int8 -> W8A8" in text
    assert len(text) < 400


def test_a_checkpoint_of_ours_is_told_from_a_stranger(folder, tmp_path):
    quantport.save(quantport.load(folder, "int8", model=Model), tmp_path / "q")
    with pytest.raises(QuantportError, match="it is a quantport checkpoint: quantized already"):
        quantport.plan(tmp_path / "q", "int8")
