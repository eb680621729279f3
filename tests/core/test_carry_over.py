"""What code has hung onto modules that are replaced is still there; and a model of quantized layers answers
what is asked of its parameters.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from core_models import DENSE, MOE, Tiny, ids, made, same_bits, write
from core_references import check_parts
from torch import nn

import quantport
from quantport.errors import NoTensorError, QuantportError
from quantport.model.roles import SkipCode

transformers = pytest.importorskip("transformers")
ENDS = dict.fromkeys(("model.embed_tokens", "lm_head"), "int8_weight_only")
tokens = torch.arange(12).view(2, 6)


def stock(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


def by_load(factory, tmp_path, **options):
    return quantport.load(write(tmp_path / "c", made(factory)), model=factory, **options)


def in_memory(factory, tmp_path, **options):
    model = made(factory)
    quantport.quantize_(model, **options)
    return model


both = pytest.mark.parametrize("way", [by_load, in_memory], ids=lambda f: f.__name__)
called: list[str] = []


def noted(name):
    def hook(*_):
        called.append(name)

    return hook


def hooked():
    model = Tiny()
    for name in ("up", "moe.experts.0.down_proj", "lm_head"):
        layer = model.get_submodule(name)
        layer.register_forward_hook(noted(f"{name} after"))
        layer.register_forward_pre_hook(noted(f"{name} before"), with_kwargs=True)
    return model


@both
def test_hooks_run_where_they_did(way, tmp_path):
    called.clear()
    made(hooked)(tokens)
    expected = list(called)
    assert len(expected) == 6
    config = {"scheme": "int8", "targets": {"lm_head": "int8"}}
    model = way(hooked, tmp_path, config=config)
    assert model.lm_head.scheme == "int8"
    for twin in (model, copy.deepcopy(model)):
        called.clear()
        twin(tokens)
        assert called == expected


@pytest.mark.parametrize("how", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_is_removed_by_the_handle_of_before(how):
    model = made(Tiny)
    handle = getattr(model.up, f"register_{how}_hook")(noted(how))
    quantport.quantize_(model, "int8")
    model.norm.weight.requires_grad_(True)

    def calls():
        called.clear()
        x = torch.ones(2, 32, dtype=torch.bfloat16, requires_grad=True)
        model.up(x).float().sum().backward()
        return list(called)

    assert calls() == [how]
    handle.remove()
    assert calls() == []


def test_input_gradients_that_were_enabled_before_stay_enabled():
    model = stock(DENSE)
    model.enable_input_require_grads()
    quantport.quantize_(model, config={"scheme": "int8", "targets": ENDS})
    embedded = model.get_input_embeddings()(ids)
    assert embedded.requires_grad
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()(ids).requires_grad


def furnished():
    model = Tiny()
    model.up.role, model.up.note = "first", {"a": [1]}
    model.embed_tokens.origin = "here"
    model.down.register_buffer("smooth", torch.ones(129))
    model.down.register_buffer("scratch", torch.ones(3), persistent=False)
    model.narrow.register_parameter("gain", nn.Parameter(torch.ones(7)))
    model.narrow.add_module("adapter", nn.Linear(1, 32))
    return model


@both
def test_attributes_tensors_and_modules_are_still_there(way, tmp_path):
    targets = {"embed_tokens": "int8_weight_only"}
    model = way(furnished, tmp_path, config={"scheme": "int8_weight_only", "targets": targets})
    assert (model.up.role, model.up.note, model.embed_tokens.origin) == ("first", {"a": [1]}, "here")
    assert model.embed_tokens.max_norm is None
    expected = made(furnished).state_dict()
    for name in ("down.smooth", "narrow.gain", "narrow.adapter.bias"):
        assert same_bits(model.state_dict()[name], expected[name]), name
    assert "down.scratch" not in model.state_dict()
    assert model.down.scratch.shape == (3,)
    assert model.narrow.adapter.scheme == "int8_weight_only"
    again = quantport.load(quantport.save(model, tmp_path / "saved"), model=furnished)
    assert same_bits(again.down.smooth, expected["down.smooth"])
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_an_attribute_that_cannot_be_carried_over_is_named():
    model = made(Tiny)
    model.up.specs = "mine"
    with pytest.warns(UserWarning, match="'specs' of up is lost"):
        quantport.quantize_(model, "int8")


def exchanged(model):
    model.up.forward = lambda x: x[..., :1].expand(*x.shape[:-1], 129)
    return "up"


def state_hook(model):
    model.down.register_state_dict_pre_hook(lambda *_: None)
    return "down"


def load_hook(model):
    model.moe.experts[1].up_proj.register_load_state_dict_post_hook(lambda *_: None)
    return "moe.experts.1.up_proj"


def own_scale(model):
    model.up.register_buffer("weight_scale", torch.ones(1))
    return "up"


def embedding_forward(model):
    model.embed_tokens.forward = lambda x: x
    return "embed_tokens"


@pytest.mark.parametrize(
    "hang", [exchanged, state_hook, load_hook, own_scale, embedding_forward], ids=lambda f: f.__name__
)
def test_what_would_be_lost_stays_in_16_bits(hang):
    model = made(Tiny)
    name = hang(model)
    before = model.get_submodule(name)
    plan = quantport.quantize_(model, "int8")
    assert plan.by_layer[name].skip_reason.code in (SkipCode.HOOKED, SkipCode.ROLE)
    assert model.get_submodule(name) is before
    if hang is embedding_forward:
        with pytest.raises(QuantportError, match="exchanged"):
            quantport.plan(model, config={"targets": {name: "int8"}, "scheme": "int8"})


class Experts(nn.Module):
    """Fused experts with a scale of their own, which the forward of quantized experts knows nothing of."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 16, 8))
        self.down_proj = nn.Parameter(torch.zeros(2, 8, 8))
        self.act_fn = nn.SiLU()
        self.output_scale = nn.Parameter(torch.ones(2))


def test_experts_with_parameters_of_their_own_stay():
    plan = quantport.plan(made(lambda: nn.ModuleDict({"experts": Experts()})), "int8")
    step = plan.by_layer["experts"]
    assert step.skip_reason.code is SkipCode.OTHER_EXPERTS
    assert "output_scale" in step.note


# --- parameters
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "config"),
    [
        (DENSE, {"scheme": "int8"}),
        (DENSE, {"scheme": "int4", "targets": ENDS}),
        (MOE, {"scheme": "fp8_per_block"}),
        (MOE, {"scheme": "int8", "ignore": ["*.self_attn.*"]}),
    ],
    ids=str,
)
def test_parameters_answer_as_those_of_the_16_bit_model(path, config):
    model, original = quantport.load(path, config=config), stock(path)
    here = dict(model.named_modules())
    for name, module in original.named_modules():
        if name in here and next(module.parameters(), None) is not None:
            first = next(here[name].parameters())
            assert (first.dtype, first.device.type) == (torch.bfloat16, "cpu"), name
    assert model.num_parameters() == original.num_parameters()
    assert model.model.num_parameters() == original.model.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == original.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) == 0
    assert model.dtype is torch.bfloat16
    assert model.get_memory_footprint() < original.get_memory_footprint()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_counts_its_own_parameters(copied):
    model = quantport.load(DENSE, "int8")
    twin = copied(model)
    count = model.num_parameters()
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None
    assert twin.num_parameters() == count
    assert next(twin.model.layers[0].mlp.parameters()).dtype is torch.bfloat16


def test_a_model_that_counts_itself_dies_at_once():
    """Without the help of the garbage collector: it may hold a device's memory."""
    gc.collect()
    gc.disable()
    try:
        model = made(lambda: transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(DENSE)))
        quantport.quantize_(model, "int8")
        layer = weakref.ref(model.model.layers[0].mlp.up_proj)
        model.num_parameters()
        del model
        assert layer() is None
    finally:
        gc.enable()


def quantized_layer(name):
    model = made(Tiny)
    quantport.quantize_(model, config={"scheme": "int8", "targets": {"embed_tokens": "int8_weight_only"}})
    return model.get_submodule(name)


READS = {
    "sum": lambda p, x: p.sum(),
    "mean": lambda p, x: torch.mean(p),
    "largest": lambda p, x: p.abs().max(),
    "arithmetic": lambda p, x: 2 * p - 1,
    "index": lambda p, x: p[0],
    "first": lambda p, x: p.flatten()[0],
    "matmul": lambda p, x: x @ p.T,
    "linear": lambda p, x: torch.nn.functional.linear(x, p),
    "item": lambda p, x: p.item(),
    "second size": lambda p, x: p.size(1),
    "narrow": lambda p, x: p.narrow(0, 0, 4),
}


@pytest.mark.parametrize("read", READS.values(), ids=list(READS))
@pytest.mark.parametrize("name", ["down", "moe.experts", "embed_tokens"])
def test_values_of_an_empty_weight_are_refused(name, read):
    """They would be 0, NaN, or an error of torch about a tensor that nobody has made."""
    layer = quantized_layer(name)
    parameter = next(layer.parameters())
    with pytest.raises(NoTensorError) as caught:
        read(parameter, torch.ones(2, 8, dtype=torch.bfloat16, device="cpu"))
    check_parts(caught.value, "of a quantized layer", "codes and scales", "ignore=")


@pytest.mark.parametrize("name", ["down", "moe.experts", "embed_tokens"])
def test_what_users_ask_the_first_parameter_is_answered(name):
    layer = quantized_layer(name)
    first = next(layer.parameters())
    x = torch.ones(3, dtype=torch.float32, device="cpu")
    assert (first.dtype, first.device.type, first.requires_grad) == (torch.bfloat16, "cpu", False)
    assert x.to(first).dtype is first.new_zeros(2).dtype is torch.bfloat16
    assert (first.numel(), first.is_cuda, first.is_meta, first.is_floating_point()) == (0, False, False, True)
    assert sum(p.numel() * p.element_size() for p in layer.parameters()) == 0
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.half()):
        again = next(copied.parameters())
        assert type(again) is type(first)
        assert repr(again)
    assert again.dtype is torch.float16


def test_an_empty_weight_follows_its_module_and_is_in_no_state_dict(tmp_path):
    model = made(Tiny)
    quantport.quantize_(model, "int8")
    assert next(model.moe.experts.parameters()).dtype is torch.bfloat16
    assert not any("empty_weight" in name for name in model.state_dict())
    assert not any("empty_weight" in name for name, _ in model.down.named_parameters(recurse=False))
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.half()
    assert next(model.down.parameters()).dtype is torch.float16
    model.to("meta")
    assert next(model.down.parameters()).is_meta
