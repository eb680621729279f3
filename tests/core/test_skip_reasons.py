"""What a model says of its layers: a role, and a code for why one is left alone."""

from __future__ import annotations

import pytest
import torch
from core_models import made
from torch import nn

import quantport
from quantport.loading.swap_modules import match_modules
from quantport.model.layers import find_layers
from quantport.model.roles import Role, SkipCode


class Mine(nn.Linear):
    """Not a plain torch.nn.Linear."""


class Tied(nn.Module):
    """Two linear layers of one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight


class Experts(nn.Module):
    """Fused experts with biases."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2, 16, 8, dtype=torch.float32, device="cpu"))
        self.down_proj = nn.Parameter(torch.empty(2, 8, 8, dtype=torch.float32, device="cpu"))
        self.down_proj_bias = nn.Parameter(torch.empty(2, 8, dtype=torch.float32, device="cpu"))


def checked(factory):
    model = made(factory)
    found = match_modules(find_layers(dict(model.named_parameters())), model, lambda layer: layer.name)
    return {layer.name: layer for layer in found}


@pytest.mark.parametrize(
    ("factory", "name", "code"),
    [
        (lambda: nn.Linear(8, 8), "", SkipCode.WHOLE_MODEL),
        (lambda: nn.ModuleDict({"a": Mine(8, 8)}), "a", SkipCode.OTHER_LINEAR),
        (lambda: nn.ModuleDict({"a": nn.Embedding(8, 8, max_norm=1.0)}), "a", SkipCode.OTHER_EMBEDDING),
        (lambda: nn.ModuleDict({"a": nn.Embedding(8, 8)}), "a", SkipCode.ROLE),
        (lambda: nn.ModuleDict({"experts": Experts()}), "experts", SkipCode.OTHER_EXPERTS),
        (Tied, "a", SkipCode.TIED),
        (lambda: nn.TransformerEncoderLayer(32, 4, 64), "linear1", SkipCode.WEIGHT_READ),
    ],
    ids=lambda value: str(value) if isinstance(value, SkipCode) else "",
)
def test_every_reason_of_a_model_has_a_code(factory, name, code):
    assert checked(factory)[name].skipped_as(code)


def test_what_is_quantized_already_is_no_plain_linear():
    model = nn.ModuleDict({"a": nn.Linear(8, 8, dtype=torch.bfloat16)})
    layers = find_layers(dict(model.named_parameters()))
    quantport.quantize_(model, "int8")
    found = {layer.name: layer for layer in match_modules(layers, model, lambda layer: layer.name)}
    assert found["a"].skipped_as(SkipCode.QUANTIZED_ALREADY)


def test_the_module_decides_what_a_layer_is():
    """Whatever it is called: names are all that a checkpoint has."""
    layers = checked(lambda: nn.ModuleDict({"x_embedder": nn.Linear(8, 8), "table": nn.Embedding(8, 8)}))
    assert (layers["x_embedder"].role, layers["x_embedder"].skip_reason) == (Role.LINEAR, None)
    assert (layers["table"].role, layers["table"].opt_in) == (Role.EMBEDDING, True)


@pytest.mark.parametrize("config", [{"linear": None}, {"ignore": ["*"]}, {"targets": {"a": None}}], ids=str)
def test_a_configuration_may_leave_everything_alone(config):
    model = made(lambda: nn.ModuleDict({"a": nn.Linear(8, 8)}))
    plan = quantport.quantize_(model, config={"scheme": "int8", **config})
    assert plan.quantized == ()
    assert plan.by_layer["a"].skip_reason.configured
