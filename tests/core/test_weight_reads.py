"""Layers whose weight other code takes: they stay in 16 bits, and what stands for a weight is no tensor."""

from __future__ import annotations

import operator

import pytest
import torch
from core_models import made, write
from core_references import check_parts
from core_tiny import tiny_model
from torch import nn
from torch.nn import functional as F

import quantport
from quantport.errors import ConfigError, NoTensorError
from quantport.model.roles import SkipCode
from quantport.model.weight_reads import find_weight_reads
from quantport.modules import QuantLinear


class Reading(nn.Module):
    """A block that calls ``called`` and takes the weight of ``read``."""

    def __init__(self, parallel=1):
        super().__init__()
        self.called, self.read = nn.Linear(32, 32), nn.Linear(32, 32)
        self.parallel = parallel


class ByOperator(Reading):
    def forward(self, x):
        return self.called(x) @ self.read.weight.T


class ByFunction(Reading):
    def forward(self, x):
        return self.inner(self.called(x))

    def inner(self, x):
        return F.linear(x, self.read.weight, self.read.bias)


class ByKeyword(Reading):
    def forward(self, x):
        x = self.called(x)
        if self.training and x.is_cuda:
            return F.linear(x, weight=self.read.weight)
        return self.read(x)


class ByAlias(Reading):
    def forward(self, x):
        layer = self.read
        weight = layer.weight
        return self.called(x) @ weight


class ByBase(ByOperator):
    def forward(self, x):
        return super().forward(x) + 1


class Listed(Reading):
    """Reads an item of a list, and those that it loops over."""

    def __init__(self):
        super().__init__()
        del self.read
        self.first = nn.ModuleList([nn.Linear(32, 32)])
        self.blocks = nn.ModuleList([Reading(), Reading()])

    def forward(self, x):
        x = x @ self.first[0].weight
        for i, block in enumerate(self.blocks):
            x = block.called(x) @ block.read.weight * i
        return x + sum(b.read.weight.sum() for b in self.blocks[1:])


READ = {
    ByOperator: {"read"},
    ByFunction: {"read"},
    ByKeyword: {"read"},
    ByAlias: {"read"},
    ByBase: {"read"},
    Listed: {"first.0", "blocks.0.read", "blocks.1.read"},
}


class Asking(Reading):
    """What a quantized layer answers is no read, nor is the own weight, nor what only sets up."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.read.weight)
        self.weight = nn.Parameter(torch.ones(32, dtype=torch.float32, device="cpu"))

    def reset_parameters(self):
        self.read.weight.data.zero_()

    def forward(self, x):
        if isinstance(self.read.weight, torch.Tensor) and self.read.weight is not None:
            x = x.to(self.read.weight.dtype) * self.weight
        return self.called(self.read(x)).reshape(-1, self.read.weight.shape[0]).to(self.read.weight.device)


class Parallel(Reading):
    """Reads on branches that its own attributes rule out, or not."""

    def forward(self, x):
        if self.parallel > 1 and not x.is_cuda:
            return x @ self.read.weight
        x = x @ self.called.weight if self.parallel else x
        return self.read(x)


@pytest.mark.parametrize("block", READ)
def test_a_layer_whose_weight_is_read_stays(block, tmp_path):
    def factory():
        return nn.ModuleDict({"block": block(), "last": nn.Linear(32, 32)})

    expected = {f"block.{name}" for name in READ[block]}
    model = made(factory)
    folder = write(tmp_path / "model", model)
    plan = quantport.quantize_(model, "int8_weight_only")
    loaded = quantport.load(folder, "int8_weight_only", model=factory)
    for done in (plan, loaded.quantport_plan):
        kept = {
            s.layer.name for s in done.steps if s.skip_reason and s.skip_reason.code is SkipCode.WEIGHT_READ
        }
        assert kept == expected
    assert isinstance(model["last"], QuantLinear)
    x = torch.ones(2, 32, dtype=torch.bfloat16)
    assert torch.equal(model["block"](x), loaded["block"](x))


@pytest.mark.parametrize(
    ("model", "read"),
    [
        (Asking(), set()),
        (Parallel(1), {"called"}),
        (Parallel(2), {"called", "read"}),
        (Parallel(0), set()),
        (nn.TransformerEncoderLayer(32, 4, 64), {"linear1", "linear2", "self_attn.out_proj"}),
    ],
    ids=["asking", "parallel 1", "parallel 2", "parallel 0", "torch"],
)
def test_what_counts_as_a_read(model, read):
    paths = {module: path for path, module in model.named_modules()}
    assert {paths[m] for m in find_weight_reads(model) if isinstance(m, nn.Linear)} == read


def test_a_class_without_source_says_nothing():
    names = {"nn": nn}
    exec("class Sourceless(nn.Linear):\n    def forward(self, x):\n        return x @ self.a.weight", names)
    assert find_weight_reads(names["Sourceless"](2, 2)) == {}


@pytest.mark.parametrize(
    ("name", "own", "read"),
    [
        ("MambaForCausalLM", {}, {"x_proj", "dt_proj", "out_proj"}),
        ("FalconMambaForCausalLM", {}, {"x_proj", "dt_proj", "out_proj"}),
        ("JambaForCausalLM", {"attn_layer_period": 2, "attn_layer_offset": 1}, {"dt_proj"}),
        ("Mamba2ForCausalLM", {"num_heads": 8, "n_groups": 2}, {"out_proj"}),
        ("RwkvForCausalLM", {"attention_hidden_size": 32}, {"output", "value"}),
        ("RwkvForCausalLM", {"attention_hidden_size": 32, "rescale_every": 0}, set()),
        ("BloomForCausalLM", {}, set()),
        ("BloomForCausalLM", {"pretraining_tp": 2, "slow_but_exact": True}, {"dense", "dense_4h_to_h"}),
        ("T5ForConditionalGeneration", {}, set()),
        ("LlamaForCausalLM", {}, set()),
    ],
)
def test_layers_of_transformers_whose_weight_is_read(name, own, read):
    model = tiny_model(name, own)
    modules = find_weight_reads(model)
    paths = [
        path for path, module in model.named_modules() if module in modules and type(module) is nn.Linear
    ]
    assert {path.rpartition(".")[2] for path in paths} == read


def test_what_the_caller_may_fuse_is_no_read():
    """``Attention.fuse_projections`` of Diffusers concatenates weights, where somebody calls it."""
    from diffusers.models.attention_processor import Attention

    with torch.device("meta"):
        attention = Attention(query_dim=64, heads=2, dim_head=32)
    assert find_weight_reads(attention) == {}


def test_it_cannot_be_asked_for():
    model, targets = made(lambda: nn.ModuleDict({"block": ByOperator()})), {"block.read": "int8"}
    with pytest.raises(ConfigError, match="ByOperator reads its weight") as caught:
        quantport.quantize_(model, config={"scheme": "int8", "targets": targets})
    check_parts(caught.value, "block.read")


UNARY = [operator.neg, operator.abs, operator.invert, bool, len, iter, float, int, list]
BINARY = [
    *(
        operator.add,
        operator.sub,
        operator.mul,
        operator.truediv,
        operator.floordiv,
        operator.mod,
        operator.pow,
    ),
    *(operator.matmul, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    *(operator.iadd, operator.imul, operator.imatmul, operator.and_, operator.or_, operator.getitem),
]
FUNCTIONS = [
    lambda x, w: F.linear(x, w),
    lambda x, w: torch.matmul(x, w),
    lambda x, w: torch.cat([x, w]),
    lambda x, w: x.copy_(w),
    lambda x, w: w.to(torch.float32),
    lambda x, w: w[0],
    lambda x, w: operator.setitem(w, 0, x),
    lambda x, w: x in w,
]


@pytest.fixture(scope="module")
def weight():
    model = made(lambda: nn.ModuleDict({"a": nn.Linear(32, 32)}))
    quantport.quantize_(model, "int8_weight_only")
    return model["a"].weight


@pytest.mark.parametrize("operation", UNARY, ids=lambda op: op.__name__)
def test_operators_on_the_stand_in_say_why(operation, weight):
    with pytest.raises(NoTensorError) as caught:
        operation(weight)
    check_parts(caught.value, "codes and scales", "ignore")


@pytest.mark.parametrize("operation", [*BINARY, *FUNCTIONS], ids=lambda op: op.__name__)
def test_operators_with_the_stand_in_say_why(operation, weight):
    x = torch.ones(32, 32, dtype=torch.bfloat16)
    with pytest.raises(NoTensorError) as caught:
        operation(x, weight)
    check_parts(caught.value, "codes and scales")
    if operation in BINARY:
        for other in (x, 2):
            with pytest.raises(NoTensorError):
                operation(weight, other)


def test_the_stand_in_answers_what_it_knows(weight):
    assert (weight.shape, weight.dtype, weight.device.type) == ((32, 32), torch.bfloat16, "cpu")
    assert not hasattr(weight, "SCB")
    assert "32" in repr(weight)
    assert weight in {weight}
