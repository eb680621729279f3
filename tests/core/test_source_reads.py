"""Weights that the code of a model takes by a detour: through a function, a property, a list, a name that is
put together.
"""

from __future__ import annotations

import functools
import types
from functools import cached_property

import pytest
import torch
from core_models import made, write
from torch import nn
from torch.nn import functional as F

import quantport
from quantport.model.weight_reads import find_weight_reads


def linear_of(x, layer, scale=1):
    return F.linear(x * scale, layer.weight, layer.bias)


class Block(nn.Module):
    """Calls ``a``, takes the weight of ``b``, and leaves ``c`` to the case."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        return self.c(self.a(x) @ self.taken(x))


class Function(Block):
    def forward(self, x):
        return self.c(linear_of(self.a(x), self.b))


class Keyword(Block):
    def forward(self, x):
        return self.c(linear_of(scale=2, layer=self.b, x=self.a(x)))


class Method(Block):
    def through(self, layer, x):
        return F.linear(x, layer.weight)

    def forward(self, x):
        return self.c(self.through(self.b, self.a(x)))


class Static(Block):
    @staticmethod
    def through(*layers):
        return layers[0].weight

    def taken(self, x):
        return self.through(self.b, self.a)


class Child(nn.Module):
    def forward(self, x, layer):
        return x @ layer.weight


class ByChild(Block):
    def __init__(self):
        super().__init__()
        self.child = Child()

    def forward(self, x):
        return self.c(self.child(self.a(x), self.b))


class Property(Block):
    @property
    def matrix(self):
        return self.b.weight

    def taken(self, x):
        return self.matrix


class Alias(Block):
    @cached_property
    def other(self):
        return self.b

    def taken(self, x):
        return self.other.weight


class Unpacked(Block):
    def taken(self, x):
        first, second = self.a, self.b
        return second.weight + first(x).sum()


class Walrus(Block):
    def taken(self, x):
        return layer.weight if (layer := self.b) is not None else x


class Either(Block):
    def taken(self, x):
        layer: nn.Module = self.b
        if x.sum() > 1e9:
            layer = self
        return layer.weight


class Loop(Block):
    def taken(self, x):
        return sum(layer.weight for layer in (self.b,))


class Zipped(Block):
    def taken(self, x):
        return sum(other.weight * layer(x).mean() for layer, other in zip([self.a], [self.b], strict=True))


class Named(Block):
    def taken(self, x):
        return getattr(self, "b").weight  # noqa: B009  # the case


class WeightNamed(Block):
    def taken(self, x):
        return getattr(self.b, "weight", None)


class Letters(Block):
    def taken(self, x):
        return sum(getattr(self, name).weight for name in "b")


class PutTogether(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.up_b, self.c = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        return self.c(sum(self.a(x) @ getattr(self, f"up_{name}").weight for name in ["b"]))


class Inner(Block):
    def taken(self, x):
        return self._modules["b"].weight


class Parameters(Block):
    def taken(self, x):
        return self.b._parameters["weight"] if x.is_cuda else self.b.state_dict()["weight"]


class Path(Block):
    def taken(self, x):
        return self.get_submodule("b").weight


class Listed(Block):
    """Where it is no submodule by this name, and has two owners."""

    def __init__(self):
        super().__init__()
        self.others = [self.b]

    def taken(self, x):
        return self.others[0].weight


class InDictionary(nn.Module):
    def __init__(self):
        super().__init__()
        self.d = nn.ModuleDict({name: nn.Linear(32, 32) for name in "abc"})

    def forward(self, x):
        layers = {name: layer for name, layer in self.d.items() if name == "b"}
        return self.d["c"](self.d["a"](x) @ self.d["b"].weight) if layers else x


class Replaced(Block):
    """Its ``forward`` is another function's."""

    def __init__(self):
        super().__init__()
        self.forward = types.MethodType(lambda block, x: block.through(x), self)

    def through(self, x):
        return self.c(self.a(x) @ self.b.weight)


def forward_of(block, x):
    return block.c(block.a(x) @ block.b.weight)


class Partial(Block):
    def __init__(self):
        super().__init__()
        self.forward = functools.partial(forward_of, self)


DETOURS = [
    *(
        Function,
        Keyword,
        Method,
        Static,
        ByChild,
        Property,
        Alias,
        Unpacked,
        Walrus,
        Either,
        Loop,
        Zipped,
        Named,
    ),
    *(WeightNamed, Letters, PutTogether, Inner, Parameters, Path, Listed, InDictionary, Replaced, Partial),
]


def read_of(model):
    found = find_weight_reads(model)
    return {path for path, module in model.named_modules() if module in found and type(module) is nn.Linear}


@pytest.mark.parametrize("block", DETOURS)
def test_a_detour_is_followed(block, tmp_path):
    model = made(lambda: nn.ModuleDict({"block": block()}))
    assert {path.rpartition(".")[2] for path in read_of(model)} == {"up_b" if block is PutTogether else "b"}
    x = torch.ones(2, 32, dtype=torch.bfloat16)
    expected, folder = model["block"](x), write(tmp_path / "model", model)
    quantport.quantize_(model, "int8_weight_only")
    error = (model["block"](x) - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.1
    loaded = quantport.load(folder, "int8_weight_only", model=lambda: nn.ModuleDict({"block": block()}))
    if block not in (Replaced, Partial):  # which is bound to the module that they were made for
        assert torch.equal(loaded["block"](x), model["block"](x))


class Asks(Block):
    """What a quantized layer answers, and other layers that are only called."""

    @property
    def weight(self):
        return self.b.weight

    def forward(self, x):
        for layer in (self.a, self.b, self.c):
            x = layer(x).to(layer.weight.dtype).reshape(-1, getattr(layer, "weight").shape[0])  # noqa: B009
        return linear_shape(x, self.b)


def linear_shape(x, layer):
    return x if layer.weight is not None and x.shape[-1] == layer.weight.shape[1] else layer(x)


def test_what_no_forward_takes_is_no_read():
    """A property that only hands a weight on, to whoever asks, is none."""
    assert read_of(made(lambda: nn.ModuleDict({"block": Asks()}))) == set()


class Recursive(Block):
    def down(self, layers):
        return self.down(layers[1:]) if len(layers) > 1 else layers[0].weight

    def taken(self, x):
        return self.down([self.a, self.b])


def test_what_calls_itself_is_read_once():
    assert "block.b" in read_of(made(lambda: nn.ModuleDict({"block": Recursive()})))
