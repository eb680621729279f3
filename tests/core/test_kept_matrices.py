"""Matrices that stay in 16 bits are rows of the plan, with the reason, and a warning where they are most."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from core_fakes import Shape
from core_models import made, write
from core_tiny import tiny_model
from torch import nn

import quantport
from quantport.cli.plans import plan_page
from quantport.model.layers import find_layers
from quantport.model.roles import Role, SkipCode
from quantport.model.stored_experts import find_renamed_experts

SCHEME = "int8_weight_only"
IGNORED = pytest.mark.filterwarnings("ignore:.*of the bytes of matrices are quantized:UserWarning")
EXPERTS = {
    "JetMoeForCausalLM": ({}, {"weight"}, SkipCode.OTHER_PARAMETER),
}


def rows(plan):
    return {row["name"]: row for row in json.loads(plan.to_json())["layers"]}


@IGNORED
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_that_stay_are_rows_with_their_reason(name, tmp_path):
    own, leaves, code = EXPERTS[name]
    model = tiny_model(name, own)
    model.save_pretrained(tmp_path)
    stacks = {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] in leaves}
    stacks = {n: p for n, p in stacks.items() if p.dim() == 3 or "experts.mlp" in n}
    loaded = quantport.load(tmp_path, SCHEME).quantport_plan
    for plan in (quantport.plan(tmp_path, SCHEME), loaded, quantport.quantize_(model, SCHEME)):
        for path, parameter in stacks.items():
            row = rows(plan)[path]
            assert (row["skip_reason"], row["bytes_before"]) == (code.value, parameter.nbytes)
            assert row["note"]
        page = plan_page(plan)
        (others,) = (g for g in page.data["groups"] if g["layers"].startswith("other tensors"))
        assert others["bytes_before"] < sum(p.nbytes for p in stacks.values()) / 8


class Buffers(nn.Module):
    """A matrix that is a buffer, and one that no file holds."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 32)
        self.register_buffer("slopes", torch.ones(4, 8))
        self.register_buffer("mask", torch.ones(64, 64), persistent=False)


class Backwards(nn.Module):
    """The head comes first, whose weight is stored as that of the embedding."""

    def __init__(self):
        super().__init__()
        self.lm_head, self.up = nn.Linear(32, 20, bias=False), nn.Linear(32, 32)
        self.embed_tokens = nn.Embedding(20, 32)
        self.lm_head.weight = self.embed_tokens.weight
        self.all_tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}


@pytest.mark.parametrize("name", [Buffers, Backwards, "XLMRobertaForMaskedLM", "CamembertForCausalLM"])
def test_memory_and_file_have_the_same_rows(name, tmp_path):
    if isinstance(name, str):
        model, factory = tiny_model(name), None
        model.save_pretrained(tmp_path)
    else:
        model, factory = made(name), name
        write(tmp_path, {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"})
    stored, held = quantport.plan(tmp_path, SCHEME, model=factory), quantport.plan(model, SCHEME)
    for plan in (held, quantport.quantize_(model, SCHEME)):
        assert (plan.before, plan.after) == (stored.before, stored.after)
        assert sorted(rows(plan)) == sorted(rows(stored))


@IGNORED
@pytest.mark.parametrize("name", ["GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"])
def test_experts_that_the_file_calls_otherwise_are_quantized_all_the_same(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    loaded = quantport.load(tmp_path, SCHEME).quantport_plan
    for plan in (quantport.plan(tmp_path, SCHEME), loaded, quantport.quantize_(model, SCHEME)):
        experts = {s.layer.name for s in plan.quantized if s.layer.experts}
        assert experts == {f"model.layers.{i}.block_sparse_moe.experts" for i in range(2)}


def test_renamed_experts_keep_the_tensors_of_the_file():
    shapes = {"moe.input.weight": (4, 96, 32), "moe.router.weight": (4, 32), "moe.output.weight": (4, 32, 48)}
    tensors = {name: Shape(shape) for name, shape in shapes.items()}
    names = {"moe.input.weight": "moe.experts.gate_up_proj", "moe.output.weight": "moe.experts.down_proj"}
    layers = find_renamed_experts(find_layers(tensors), names, tensors)
    assert [(x.name, x.role) for x in layers] == [("moe.experts", Role.EXPERTS), ("moe.router", Role.ROUTER)]
    assert {p.tensor for parts in layers[0].parts.values() for p in parts} == set(names)
    tensors["moe.output.weight"] = Shape((4, 32, 40))
    uneven = find_renamed_experts(find_layers(tensors), names, tensors)
    assert [(x.name, x.skip_reason.code) for x in uneven if x.role is Role.EXPERTS] == [
        (name, SkipCode.UNEVEN_EXPERTS) for name in names
    ]


@pytest.mark.parametrize(
    ("name", "shape", "weight", "code"),
    [
        ("a.bias", (8,), (1, 8), SkipCode.NOT_A_MATRIX),
        ("a.cls_token", (1, 1, 8), (1, 8), SkipCode.NOT_A_MATRIX),
        ("a.scale", (), (1, 1), SkipCode.NOT_A_MATRIX),
        ("a.table", (8, 4), (8, 4), SkipCode.OTHER_PARAMETER),
        ("a.table", (1, 8, 4), (8, 4), SkipCode.OTHER_PARAMETER),
        ("a.stack", (3, 8, 4), (24, 4), SkipCode.OTHER_PARAMETER),
        ("a.weight", (8, 4, 3, 3), (96, 3), SkipCode.CONVOLUTION),
        ("m.experts.mlp.w1", (24, 8), (24, 8), SkipCode.OTHER_PARAMETER),
    ],
)
def test_a_matrix_is_told_from_a_vector(name, shape, weight, code):
    (layer,) = find_layers({name: Shape(shape)})
    assert (layer.kind, layer.weights[0][1:], layer.skip_reason.code) == ("other", weight, code)
    assert layer.is_matrix == (code is not SkipCode.NOT_A_MATRIX)


class Own(nn.Module):
    """Multiplies by a parameter of its own, and by a linear layer."""

    def __init__(self, rows=64):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(rows, 32, dtype=torch.float32, device="cpu"))
        self.stack = nn.Conv1d(32, 8, 3)
        self.linear = nn.Linear(32, 32)


def test_the_module_says_what_a_matrix_belongs_to():
    plan = quantport.plan(made(lambda: nn.ModuleDict({"a": Own(4)})), SCHEME)
    assert plan.by_layer["a.table"].skip_reason.code is SkipCode.OTHER_PARAMETER
    assert "Own" in plan.by_layer["a.table"].note
    assert plan.by_layer["a.stack.weight"].skip_reason.code is SkipCode.CONVOLUTION


@pytest.mark.parametrize("how", ["load", "quantize_"])
def test_less_than_half_is_a_warning(how, tmp_path, monkeypatch):
    monkeypatch.setattr("quantport.planning.plan._WORTH_A_WARNING", 0)

    def factory():
        return nn.ModuleDict({"a": Own()})

    model = made(factory)
    folder = write(tmp_path / "model", model)
    run = {
        "load": lambda: quantport.load(folder, SCHEME, model=factory).quantport_plan,
        "quantize_": lambda: quantport.quantize_(model, SCHEME),
    }
    with pytest.warns(UserWarning, match=r"only 27% of the bytes of matrices .* a\.table"):
        plan = run[how]()
    assert plan_page(plan).data["warnings"][0] == plan.warnings[0]


@pytest.mark.parametrize(
    "config",
    [
        {"scheme": SCHEME, "ignore": ["a"]},
        {"scheme": SCHEME, "targets": {"a": None}},
        {"scheme": SCHEME, "targets": {"a": "bf16"}},
    ],
    ids=str,
)
def test_what_the_configuration_leaves_alone_is_no_surprise(config):
    model = made(lambda: nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(32, 32)}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quantport.quantize_(model, config=config).warnings == ()
