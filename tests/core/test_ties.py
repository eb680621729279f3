"""Weights that a configuration ties: equal bytes are a tie, different ones never are, as in Transformers."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from core_models import DENSE, made, same_state, write
from core_references import check_parts, randn
from core_tiny import tiny_model
from core_transformers import checkpoint, close, kept_alike, of_transformers, outputs, tiny
from safetensors.torch import load_file
from torch import nn

import quantport
from quantport.checkpoint import Checkpoint
from quantport.errors import CheckpointError, ConfigError
from quantport.model.roles import SkipCode
from quantport.model.tied_weights import undecided_tie
from quantport.modules import QuantLinear

TIED = {"llama": {"tie_word_embeddings": True}, "qwen2": {"tie_word_embeddings": True}}
NAMES = ("llama", "qwen2", "gemma", "opt", "llava")


def tied(name, folder, head):
    """A checkpoint of a model that ties its head, and holds ``head(embedding)`` beside the embedding."""
    model = tiny(name, **TIED.get(name, {}))
    ((target, source),) = model.all_tied_weights_keys.items()
    embedding = model.get_parameter(source)
    checkpoint(folder, model, **{target.replace(".", "__"): head(embedding)})
    return target, source


def another(embedding):
    return (randn(*embedding.shape, seed=3) * 0.1).to(embedding.dtype)


@pytest.mark.parametrize("name", NAMES)
def test_another_head_in_the_file_is_used_and_said(name, tmp_path):
    target, source = tied(name, tmp_path / "c", another)
    reference = of_transformers(tmp_path / "c")
    assert any("load finds equal bytes" in text for text in quantport.plan(tmp_path / "c").warnings)
    with pytest.warns(UserWarning, match="not tied") as caught:
        model = quantport.load(tmp_path / "c", "int8_weight_only")
    assert [str(w.message) for w in caught] == list(model.quantport_plan.warnings)
    assert {target, source} <= kept_alike(model, reference)
    assert close(outputs(model), outputs(reference))
    model.tie_weights()
    assert not torch.equal(model.get_parameter(target), model.get_parameter(source))
    again = quantport.load(quantport.save(model, tmp_path / "q"))
    same_state(again, model)
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize("name", NAMES)
def test_equal_bytes_are_one_weight(name, tmp_path):
    target, source = tied(name, tmp_path / "c", lambda embedding: embedding.clone())
    model = quantport.load(tmp_path / "c", "int8_weight_only")
    assert model.get_parameter(target) is model.get_parameter(source)
    steps = {step.layer.name: step for step in model.quantport_plan.steps}
    copy = steps.get("lm_head") or steps["lm_head.weight"]
    assert copy.layer.skipped_as(SkipCode.SECOND_COPY)
    assert (copy.before > 0, copy.after) == (True, 0)
    held = sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
    assert model.quantport_plan.after <= held
    same_state(quantport.load(quantport.save(model, tmp_path / "q")), model)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_with_the_head_alone(name, tmp_path):
    """Transformers ties the embedding to it."""
    target, source = tied(name, tmp_path / "c", another)
    with Checkpoint.open(tmp_path / "c") as opened:
        tensors = {n: opened.read(n).clone() for n in opened.tensors if n != source}
    write(tmp_path / "c", tensors)
    model = quantport.load(tmp_path / "c", "int8_weight_only")
    assert model.get_parameter(target) is model.get_parameter(source)
    kept_alike(model, of_transformers(tmp_path / "c"))


def test_what_differs_only_beyond_the_dtype_of_the_model_is_equal(tmp_path):
    target, source = tied("llama", tmp_path / "c", lambda embedding: embedding.float() * (1 + 2**-20))
    model = quantport.load(tmp_path / "c", "int8_weight_only")
    assert model.get_parameter(target) is model.get_parameter(source)
    assert kept_alike(model, of_transformers(tmp_path / "c"))


def test_other_values_in_the_last_slab_count(tmp_path, monkeypatch):
    def last(embedding):
        head = embedding.clone()
        head[-1, -1] += 1
        return head

    monkeypatch.setattr("quantport.loading.settle_ties.SLAB", 256)
    target, _ = tied("gemma", tmp_path / "c", last)
    with pytest.warns(UserWarning, match=f"{target} is stored with other values"):
        quantport.load(tmp_path / "c", "int8")


def test_ends_that_are_not_tied_may_have_schemes_of_their_own(tmp_path):
    tied("qwen2", tmp_path / "c", another)
    for targets in ({"lm_head": "int8"}, {"lm_head": "int4", "model.embed_tokens": "int8_weight_only"}):
        config = {"scheme": "int8", "targets": targets}
        with pytest.warns(UserWarning, match="not tied"):
            model = quantport.load(tmp_path / "c", config=config)
        assert isinstance(model.lm_head, QuantLinear)
        again = quantport.load(quantport.save(model, tmp_path / "q", overwrite=True))
        same_state(again, model)
        planned = quantport.plan(tmp_path / "c", config=config)
        assert planned.after == model.quantport_plan.after


@pytest.mark.parametrize("target", ["lm_head", "encoder.embed_tokens", "decoder.embed_tokens"])
def test_one_of_several_ties(target, tmp_path):
    """T5 ties three to ``shared``; its class says so, whatever the configuration. It is said once."""
    model, name = tiny("t5"), f"{target}.weight"
    other = another(model.shared.weight)
    folder = checkpoint(tmp_path / "c", model, **{name.replace(".", "__"): other})
    (said,) = quantport.plan(folder, "int8_weight_only").warnings
    assert said.startswith(f"{target} is tied to shared by the configuration")
    with pytest.warns(UserWarning, match=f"{name} is stored with other values"):
        loaded = quantport.load(folder, "int8_weight_only")
    tied = {"lm_head", "encoder.embed_tokens", "decoder.embed_tokens"} - {target}
    assert all(loaded.get_submodule(path).weight is loaded.shared.weight for path in tied)
    assert kept_alike(loaded, of_transformers(folder))
    assert torch.equal(loaded.get_parameter(name), other)
    again = quantport.load(quantport.save(loaded, tmp_path / "q"))
    same_state(again, loaded)


SHARED, ENCODER, HEAD = "model.shared", "model.encoder.embed_tokens", "lm_head"
BESIDE = {
    "bert": ("BertForMaskedLM", {"cls.predictions.decoder": "bert.embeddings.word_embeddings"}, ""),
    "roberta": ("RobertaForMaskedLM", {"lm_head.decoder": "roberta.embeddings.word_embeddings"}, ""),
    "bart": ("BartForConditionalGeneration", {ENCODER: SHARED, HEAD: SHARED}, ""),
    "to each other": ("BartForConditionalGeneration", {ENCODER: HEAD}, SHARED),
}


@pytest.mark.parametrize("case", BESIDE)
def test_the_plan_names_the_ties_of_the_model_itself(case, tmp_path):
    """Not of the largest embedding: that may be one of positions."""
    name, ties, absent = BESIDE[case]
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    state = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if n != f"{absent}.weight"}
    for i, path in enumerate(sorted({*ties, *ties.values()} - {absent})):
        weight = model.get_submodule(path).weight
        state[f"{path}.weight"] = randn(*weight.shape, seed=i).to(weight.dtype)
    write(tmp_path, state)
    planned = quantport.plan(tmp_path, "int8_weight_only")
    assert sorted(planned.warnings) == sorted(undecided_tie(a, b) for a, b in ties.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = quantport.load(tmp_path, "int8_weight_only").quantport_plan
    assert planned.after == loaded.after


def test_the_plan_counts_a_head_that_may_be_another_weight(tmp_path):
    tied("gemma", tmp_path / "c", another)
    assert "tie_word_embeddings" not in json.loads((tmp_path / "c" / "config.json").read_text())
    planned = quantport.plan(tmp_path / "c", "int8_weight_only")
    with pytest.warns(UserWarning, match="not tied"):
        loaded = quantport.load(tmp_path / "c", "int8_weight_only").quantport_plan
    assert planned.after == loaded.after
    assert any("stored beside it" in text for text in planned.to_dict()["warnings"])
    assert quantport.plan(DENSE).warnings == ()


class Tied(nn.Module):
    """Tied by its code."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.up = nn.Embedding(20, 32), nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 20, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


class Shared(nn.Module):
    """One block under two names."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Linear(32, 32)


class Norms(nn.Module):
    """What is tied is neither an embedding nor quantized."""

    def __init__(self):
        super().__init__()
        self.up, self.a, self.b = nn.Linear(32, 32), nn.LayerNorm(32), nn.LayerNorm(32)
        self.b.weight = self.a.weight


CODED = {Tied: ("embed_tokens", "lm_head"), Shared: ("a", "b"), Norms: ("a", "b")}


@pytest.mark.parametrize("factory", CODED)
def test_what_the_code_of_a_model_ties_is_one_weight_or_refused(factory, tmp_path):
    first, second = (f"{name}.weight" for name in CODED[factory])
    state = made(factory).state_dict()
    for held in (set(), {first}, {second}):
        tensors = {n: t for n, t in state.items() if n not in held}
        model = quantport.load(write(tmp_path / "c", tensors), config={"scheme": "int8"}, model=factory)
        a, b = (model.get_submodule(name) for name in CODED[factory])
        assert a is b or a.weight is b.weight
    tensors = {**state, second: state[second] + 1}
    with pytest.raises(CheckpointError) as caught:
        quantport.load(write(tmp_path / "c", tensors), "int8", model=factory)
    check_parts(caught.value, first, second, "differ")


def test_a_second_copy_has_no_scheme_of_its_own(tmp_path):
    folder = write(tmp_path / "c", made(Shared))
    with pytest.raises(ConfigError) as caught:
        quantport.load(folder, config={"scheme": "int8", "targets": {"b": "int4"}}, model=Shared)
    check_parts(caught.value, "b", "second copy")
