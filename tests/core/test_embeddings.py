"""Embeddings as opt-in targets: rows looked up in the stored layout; one weight with the output heads that
are tied to it.
"""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from core_models import DENSE, MOE, SCHEMES, ids, made, same_bits, same_state, snapshot, untouched, write
from core_references import check_parts
from torch import nn

import quantport
from quantport import numerics
from quantport.checkpoint import Checkpoint
from quantport.errors import ConfigError, QuantportError, WeightError
from quantport.kernels.embedding import rows_of
from quantport.modules import QuantEmbedding, QuantLinear, TiedLinear
from quantport.scheme import Quant, Scheme
from quantport.scheme.catalog import BUILTIN

BY_ROW = [s for s in SCHEMES if s != "fp8_per_block"] + [
    "mxfp4",
    "nvfp4",
    "nf4:double",
    "int4_mse",
    "q6_k",
    "fp6",
]


class Untied(nn.Module):
    def __init__(self, table=nn.Embedding, **options):
        super().__init__()
        self.embed_tokens = table(50, 40, **options)
        self.lm_head = nn.Linear(40, 50)

    def forward(self, tokens):
        return self.lm_head(self.embed_tokens(tokens))


class Tied(Untied):
    def __init__(self, **options):
        super().__init__(**options)
        self.lm_head.weight = self.embed_tokens.weight


def only(scheme, *names, **rest):
    return {"linear": None, "moe": None, "targets": dict.fromkeys(names or ("embed_tokens",), scheme), **rest}


def both(scheme):
    return only(scheme, "embed_tokens", "lm_head")


@pytest.mark.parametrize("scheme", BY_ROW)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 7), (2, 3, 50)], ids=str)
def test_rows_are_those_of_the_dequantized_weight(scheme, shape):
    model = made(Untied)
    stored = numerics.quantize_weight(model.embed_tokens.weight, BUILTIN[scheme])
    quantport.quantize_(model, config=only(scheme))
    whole = numerics.dequantize_weight(stored, BUILTIN[scheme], 40, torch.bfloat16)
    tokens = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.embed_tokens(tokens), whole[tokens])
    assert all(same_bits(t, stored[key]) for key, t in model.embed_tokens.stored_weight().items())
    assert type(model.lm_head) in (nn.Linear, QuantLinear)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ids_of_either_width_and_ids_that_are_no_rows(dtype):
    model = made(Untied)
    quantport.quantize_(model, config=only("int8_weight_only"))
    assert model(torch.arange(4, dtype=dtype)).shape == (4, 50)
    with pytest.raises(IndexError):
        model(torch.tensor([50]))


@pytest.mark.parametrize("scheme", ["int8_weight_only", "int4_weight_only", "fp8_per_tensor", "int8"])
def test_a_tied_weight_is_quantized_and_kept_once(scheme, tmp_path):
    model = made(Tied)
    weight, bias = model.embed_tokens.weight.clone(), model.lm_head.bias.clone()
    plan = quantport.quantize_(model, config=both(scheme))
    (step,) = plan.quantized
    assert step.layer.name == "embed_tokens"
    assert "lm_head" in step.note
    stored = numerics.quantize_weight(weight, BUILTIN[scheme])
    assert isinstance(model.lm_head, TiedLinear)
    assert model.lm_head.embedding is model.embed_tokens
    held = sum(t.numel() * t.element_size() for t in [*model.buffers(), *model.parameters()])
    assert held == sum(t.numel() * t.element_size() for t in stored.values()) + bias.numel() * 2 == plan.after
    tokens = torch.arange(6).view(2, 3)
    x = model.embed_tokens(tokens)
    effective = BUILTIN[scheme] if step.choice.precision.endswith("A8") else BUILTIN[scheme].weight_only
    expected = numerics.linear(x.view(6, 40), stored, effective, bias).view(2, 3, 50)
    assert (model(tokens).float() - expected.float()).abs().max() <= 2.0**-6 * expected.float().abs().max()
    with Checkpoint.open(quantport.save(model, tmp_path / "out")) as checkpoint:
        names = {name.removesuffix("_codes") for name in checkpoint.tensors}
    assert names == {*(f"embed_tokens.{k}" for k in stored), "lm_head.bias"}
    again = quantport.load(tmp_path / "out", model=Tied)
    assert again.lm_head.embedding is again.embed_tokens
    same_state(again, model)
    assert torch.equal(again(tokens), model(tokens))


def test_copies_of_a_tied_model_are_tied_and_share_nothing_with_it():
    model = made(Tied)
    quantport.quantize_(model, config=both("int8_weight_only"))
    tokens = torch.arange(5)
    other = made(Tied, seed=1)
    quantport.quantize_(other, config=both("int8_weight_only"))
    other.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert twin.lm_head.embedding is twin.embed_tokens
        assert torch.equal(twin(tokens), model(tokens))
        assert not {t.data_ptr() for t in twin.buffers()} & {t.data_ptr() for t in model.buffers()}


def test_moves_and_casts_keep_the_tie_and_the_bits():
    model = made(Tied)
    quantport.quantize_(model, config=both("int8_weight_only"))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.half()
    assert model(torch.arange(3)).dtype == torch.float16
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert all(same_bits(t, state[name]) for name, t in model.state_dict().items() if name != "lm_head.bias")
    assert model.lm_head.embedding is model.embed_tokens


@pytest.mark.parametrize("tied", [False, True])
def test_compile(tied):
    model = made(Tied if tied else Untied)
    quantport.quantize_(model, config=both("int8_weight_only"))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for count in (3, 5):
        with torch.no_grad():
            assert torch.equal(compiled(torch.arange(count)), model(torch.arange(count)))
    embedding = model.embed_tokens
    args = torch.arange(4), list(embedding.packed()), embedding.bound[""].handle, torch.bfloat16
    torch.library.opcheck(torch.ops.quantport.embedding.default, args)


TRANSFORMERS = {
    "tied": (DENSE, ("model.embed_tokens", "lm_head"), "int8_weight_only"),
    "tied, int4": (DENSE, ("model.embed_tokens", "lm_head"), "int4_weight_only_g32"),
    "untied": (MOE, ("model.embed_tokens", "lm_head"), "int8"),
    "embedding alone": (MOE, ("model.embed_tokens",), "fp8_weight_only"),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformers_model(name, tmp_path):
    path, names, scheme = TRANSFORMERS[name]
    config = {"scheme": "int8", "targets": dict.fromkeys(names, scheme)}
    planned = quantport.plan(path, config=config)
    model, plain = quantport.load(path, config=config), quantport.load(path, "int8")
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    assert isinstance(model.lm_head, TiedLinear) == (path is DENSE)
    assert planned.after == model.quantport_plan.after < plain.quantport_plan.after
    assert (
        planned.by_layer["model.embed_tokens"].choice
        == model.quantport_plan.by_layer["model.embed_tokens"].choice
    )
    expected, found = plain(ids).logits.float(), model(ids).logits.float()
    assert (found - expected).norm() / expected.norm() < (0.2 if "int4" in scheme else 0.05)
    model.tie_weights()
    assert model.generate(ids[:1], max_new_tokens=3, do_sample=False).shape == (1, 15)
    again = quantport.load(quantport.save(model, tmp_path / "out"))
    same_state(again, model)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_checkpoint_with_both_copies_of_a_tied_weight(tmp_path):
    with Checkpoint.open(DENSE) as checkpoint:
        tensors = {name: checkpoint.read(name).clone() for name in checkpoint.tensors}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    folder = write(tmp_path / "c", tensors, config__json=(DENSE / "config.json").read_text())
    config = {
        "scheme": "int8",
        "targets": dict.fromkeys(("model.embed_tokens", "lm_head"), "int8_weight_only"),
    }
    (open_question,) = quantport.plan(folder, config=config).warnings
    assert "one weight if load finds equal bytes" in open_question
    model = quantport.load(folder, config=config)
    assert "a second copy" in model.quantport_plan.by_layer["lm_head.weight"].note
    same_state(model, quantport.load(DENSE, config=config))
    plain = quantport.load(folder, "int8")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("call", ["quantize_", "plan", "load"])
def test_naming_one_of_two_tied_layers(name, call, tmp_path):
    model = made(Tied)
    before, other = snapshot(model), {"embed_tokens": "lm_head", "lm_head": "embed_tokens"}[name]
    run = partial(getattr(quantport, call), model, config=only("int8", name))
    if call == "load":
        run = partial(quantport.load, write(tmp_path / "c", model), config=only("int8", name), model=Tied)
    with pytest.raises(ConfigError) as caught:
        run()
    check_parts(caught.value, name, f"{other} -> nothing", "targets")
    untouched(model, before)


BAD = {
    "other schemes": (Tied, {"targets": {"embed_tokens": "int8", "lm_head": "int4_wo"}}, "int4_weight_only"),
    "one is null": (Tied, {"targets": {"embed_tokens": "int8", "lm_head": None}}, "lm_head -> None"),
    "blocks of rows": (Untied, only("fp8_per_block"), "several rows"),
    "bf16": (Untied, only("bf16"), "null"),
    "max_norm": (lambda: Untied(max_norm=1.0), only("int8"), "max_norm"),
    "a subclass": (lambda: Untied(table=type("Scaled", (nn.Embedding,), {})), only("int8"), "Scaled"),
    "no such layer": (Untied, only("int8", "embed_token"), "embed_tokens"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    factory, config, named = BAD[what]
    model = made(factory)
    before = snapshot(model)
    with pytest.raises(QuantportError) as caught:
        quantport.quantize_(model, config=config)
    check_parts(caught.value, named)
    untouched(model, before)


def test_a_weight_that_is_not_finite_leaves_a_tied_model_as_it_was():
    model = made(Tied)
    model.embed_tokens.weight[3, 3] = float("nan")
    before = snapshot(model)
    with pytest.raises(WeightError, match="embed_tokens"):
        quantport.quantize_(model, config=both("int8"))
    untouched(model, before)


def test_two_embeddings_of_one_weight_are_not_quantized():
    class Twice(Untied):
        def __init__(self):
            super().__init__()
            self.embed_decoder = nn.Embedding(50, 40)
            self.embed_decoder.weight = self.embed_tokens.weight

    with pytest.raises(ConfigError, match="tied to a Embedding"):
        quantport.quantize_(made(Twice), config=only("int8", "embed_tokens", "embed_decoder"))


def test_left_alone_by_default_and_by_null():
    for config in ("int8", {"scheme": "int8", "targets": dict.fromkeys(("embed_tokens", "lm_head"), None)}):
        model = made(lambda: nn.ModuleDict({"a": nn.Linear(8, 8), "b": Tied()}))
        names = {"embed_tokens": "b.embed_tokens", "lm_head": "b.lm_head"}
        if isinstance(config, dict):
            config["targets"] = {names[k]: v for k, v in config["targets"].items()}
        plan = quantport.quantize_(model, config=config)
        assert [s.layer.name for s in plan.quantized] == ["a"]
        assert model["b"].lm_head.weight is model["b"].embed_tokens.weight


def test_which_layouts_have_rows():
    assert rows_of(BUILTIN["int4_weight_only"], 40) == (True, True)
    assert rows_of(BUILTIN["fp8_per_tensor"], 40) == (True, False)
    blocks = Scheme("b", Quant("e4m3fn", (32, 0)), None, "")
    assert "several rows" in rows_of(blocks, 40)


def test_an_embedding_is_one_whatever_it_is_called():
    model = nn.ModuleDict({"emb": nn.Embedding(50, 64), "out": nn.Linear(64, 8)}).bfloat16()
    plan = quantport.quantize_(model, "int8", config={"targets": {"emb": "int8_weight_only"}})
    assert plan.by_layer["emb"].requested_scheme == "int8_weight_only"
    assert model["emb"](torch.tensor([[1, 2]])).shape == (1, 2, 64)


def test_a_linear_layer_is_one_whatever_it_is_called():
    """As ``x_embedder`` of diffusion transformers: the name says embedding, the module says what it does."""
    model = made(lambda: nn.ModuleDict({"x_embedder": nn.Linear(64, 32), "embed": nn.Embedding(8, 64)}))
    plan = quantport.quantize_(model, "int8")
    assert [step.layer.name for step in plan.quantized] == ["x_embedder"]
    assert isinstance(model["x_embedder"], QuantLinear)
