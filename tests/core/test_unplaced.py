"""Tensors of a checkpoint that the model has no place for, and values that are not finite: named, and never
silent.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from core_models import Tiny, made, same_bits, write
from core_transformers import checkpoint, kept_alike, of_transformers, outputs, tiny
from test_cli import ask

import quantport
from quantport.model.roles import SkipCode

W = torch.ones(32, 32, dtype=torch.bfloat16)
EXTRA = {
    "a scale of a KV cache": ("llama", {"model.layers.0.self_attn.k_scale": torch.ones(1)}),
    "a layer too many": ("llama", {"model.layers.2.self_attn.q_proj.weight": W}),
    "layers that predict further tokens": (
        "qwen2",
        {"mtp.layers.0.self_attn.q_proj.weight": W, "mtp.norm.weight": torch.ones(32)},
    ),
    "a bias": ("llama", {"model.layers.1.self_attn.o_proj.bias": torch.ones(32)}),
    "a head": ("llama_base", {"lm_head.weight": torch.ones(96, 32)}),
    "experts": (
        "llama",
        {
            f"model.layers.2.mlp.experts.{e}.{p}_proj.weight": W.clone()
            for e in range(2)
            for p in ("gate", "up", "down")
        },
    ),
}


def extra(folder, name, tensors):
    model = tiny(name.removesuffix("_base"))
    folder = checkpoint(folder, model, **{n.replace(".", "__"): t for n, t in tensors.items()})
    if name.endswith("_base"):
        config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaModel"]}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("what", EXTRA)
def test_tensors_without_a_place_are_named_and_not_counted(what, tmp_path):
    name, tensors = EXTRA[what]
    plain = quantport.load(
        extra(tmp_path / "a", name, {"lm_head.weight": None} if "base" in name else {}), "int8"
    )
    folder = extra(tmp_path / "b", name, tensors)
    with pytest.warns(UserWarning, match="not loaded") as caught:
        model = quantport.load(folder, "int8")
    plan = model.quantport_plan
    (text,) = (str(w.message) for w in caught)
    assert plan.warnings == (text,)
    assert (
        next(iter(tensors)).rpartition(".experts")[0 if "experts" in text else 2].split(".weight")[0] in text
    )
    assert plan.after == plain.quantport_plan.after
    assert plan.before == plain.quantport_plan.before + sum(t.nbytes for t in tensors.values())
    lost = [s for s in plan.steps if s.layer.skipped_as(SkipCode.NO_MODULE)]
    assert sum(s.before for s in lost) == sum(t.nbytes for t in tensors.values())
    assert all(s.after == 0 and s.note for s in lost)
    assert set(model.state_dict()) == set(plain.state_dict())


def test_a_tensor_without_a_place_that_is_named_in_targets_is_refused(tmp_path):
    folder = extra(tmp_path / "c", *EXTRA["a layer too many"])
    config = {"scheme": "int8", "targets": {"model.layers.2.self_attn.q_proj": "int4"}}
    for does in (quantport.load, quantport.plan):
        with pytest.raises(quantport.QuantportError, match="no module"):
            does(folder, config=config)
    described = json.loads((folder / "config.json").read_text()) | {"model_type": "no_such_type"}
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(quantport.QuantportError, match="has 2 layers"):
        quantport.plan(folder, config=config)


def test_a_plan_by_names_alone_says_so(tmp_path):
    folder = extra(tmp_path / "c", *EXTRA["a layer too many"])
    assert not any("by names and shapes alone" in text for text in quantport.plan(folder, "int8").warnings)
    described = json.loads((folder / "config.json").read_text()) | {"model_type": "no_such_type"}
    (folder / "config.json").write_text(json.dumps(described))
    said = [text for text in quantport.plan(folder, "int8").warnings if "by names and shapes alone" in text]
    assert len(said) == 1
    assert "no_such_type" in said[0]


@pytest.mark.parametrize("what", ["a scale of a KV cache", "a layer too many", "experts"])
def test_the_plan_knows_what_names_tell(what, tmp_path):
    name, tensors = EXTRA[what]
    folder = extra(tmp_path / "c", name, tensors)
    planned = quantport.plan(folder, "int8")
    with pytest.warns(UserWarning, match="not loaded"):
        loaded = quantport.load(folder, "int8").quantport_plan
    assert (planned.before, planned.after) == (loaded.before, loaded.after)
    assert planned.warnings == loaded.warnings
    assert f"warning: {planned.warnings[0]}"[:60] in ask("plan", folder, "--scheme", "int8").stdout


def test_what_a_class_is_known_to_leave_out_is_no_news(tmp_path):
    """Buffers of old; layers that its class names."""
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    folder = extra(tmp_path / "a", "llama", old)
    step = quantport.load(folder, "int8").quantport_plan.by_layer[next(iter(old))]
    assert (step.after, step.layer.skipped_as(SkipCode.UNUSED)) == (0, True)


def test_a_buffer_that_is_not_stored_is_not_taken_from_a_file(tmp_path):
    folder = extra(tmp_path / "c", "llama", {"model.rotary_emb.inv_freq": torch.full((8,), 7.0)})
    model = quantport.load(folder, "int8_weight_only")
    assert not (model.model.rotary_emb.inv_freq == 7).any()
    assert same_bits(model.model.rotary_emb.inv_freq, of_transformers(folder).model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("model.norm.weight", float("nan"), "NaN"),
        ("model.embed_tokens.weight", float("inf"), "Inf"),
        ("lm_head.weight", float("-inf"), "Inf"),
        ("model.layers.1.self_attn.q_proj.bias", float("nan"), "NaN"),
    ],
)
def test_values_that_are_not_finite_in_what_stays_are_named(name, value, says, tmp_path):
    model = tiny("qwen2")
    model.get_parameter(name).flatten()[3] = value
    folder = checkpoint(tmp_path / "c", model)
    with pytest.warns(UserWarning, match=f"{name} holds {says}") as caught:
        loaded = quantport.load(folder, "int8")
    assert len(caught) == 1
    assert loaded.quantport_plan.warnings == (str(caught[0].message),)
    assert kept_alike(loaded, of_transformers(folder))


def test_masks_are_full_of_infinity(tmp_path):
    class Masked(Tiny):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((8, 8), float("-inf")).triu(1))

    folder = write(tmp_path / "c", made(Masked))
    assert same_bits(quantport.load(folder, "int8", model=Masked).mask, made(Masked).mask)
    state = {**made(Masked).state_dict(), "offset": torch.full((32,), float("nan"))}
    with pytest.warns(UserWarning, match="offset holds NaN"):
        quantport.load(write(tmp_path / "d", state), "int8", model=Masked)


def test_nothing_is_said_of_a_checkpoint_that_fits(tmp_path):
    folder = extra(tmp_path / "c", "llama", {})
    with warnings.catch_warnings(record=True) as caught:
        model = quantport.load(folder, "int8")
    assert caught == []
    assert model.quantport_plan.warnings == quantport.plan(folder).warnings == ()
    assert outputs(model).isfinite().all()
