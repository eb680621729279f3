"""``device_map`` in every form that a CPU can show."""

from __future__ import annotations

import pytest
import torch
from core_models import same_state
from core_references import check_parts
from hf_models import IDS, from_pretrained, logits, save

from quantport.errors import DeviceError
from quantport.modules import QuantModule
from quantport_transformers.placement import Placement, keep_on_cpu


@pytest.mark.parametrize(
    "device_map", ["cpu", "auto", "balanced", "sequential", {"": "cpu"}, torch.device("cpu")]
)
@pytest.mark.parametrize("kind", ["untied", "moe"])
def test_a_map_that_comes_to_the_cpu(kind, device_map, tmp_path):
    folder = save(tmp_path, kind)
    model = from_pretrained(folder, "int8", device_map=device_map)
    same_state(model, from_pretrained(folder, "int8"))
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(logits(model), logits(from_pretrained(folder, "int8")))


def test_a_strategy_knows_the_sizes_of_what_is_quantized(tmp_path):
    """What fits as it is quantized is not sent to disk, as it would be in 16 bits."""
    folder = save(tmp_path, "moe")
    limit = {"cpu": int(from_pretrained(folder, "int8").get_memory_footprint() * 1.1)}
    assert limit["cpu"] < 0.8 * from_pretrained(folder).get_memory_footprint()
    model = from_pretrained(folder, "int8", device_map="auto", max_memory=limit)
    assert not any(p.is_meta for p in model.parameters())
    assert logits(model).isfinite().all()


def test_a_module_that_was_announced_has_its_own_size_afterwards(tmp_path):
    folder = save(tmp_path, "untied")
    model = from_pretrained(folder, "int8", device_map="auto")
    assert model.get_memory_footprint() == from_pretrained(folder, "int8").get_memory_footprint()


@pytest.mark.parametrize("kind", ["untied", "moe"])
def test_a_map_that_accelerate_dispatches(kind, tmp_path):
    """Two spellings of one device are two devices to Transformers: the one computes, the other offloads."""
    folder = save(tmp_path, kind)
    here = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"))
    device_map = {**dict.fromkeys(here, torch.device("cpu")), "model.layers.1": "cpu", "lm_head": "cpu"}
    model, expected = from_pretrained(folder, "int8", device_map=device_map), from_pretrained(folder, "int8")
    assert model.lm_head.weight.is_meta
    for _ in range(2):
        assert torch.equal(logits(model), logits(expected))


SPREAD = {
    **dict.fromkeys(("model.embed_tokens", "model.layers.0"), "cuda:0"),
    "model.layers.1": "cpu",
    "lm_head": "cpu",
}


def test_a_map_of_several_devices_says_what_computes_where():
    place = Placement(SPREAD)
    assert (place.device, place.spread, place.undecided) == (torch.device("cuda:0"), True, False)
    for path in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"):
        assert place.device_of(path) == torch.device("cuda:0")
    several = Placement({"model.layers.0": "cuda:1", "model.layers.1": torch.device("cuda:0")})
    assert several.device_of("model.layers.0.mlp") == torch.device("cuda:1")
    assert several.device_of("model.layers.1.mlp") == torch.device("cuda:0")


def test_a_strategy_that_leaves_nothing_on_the_device_of_the_plan_is_refused():
    with pytest.raises(DeviceError) as caught:
        Placement({"": "cpu"}).agree_with(torch.device("cuda:0"))
    check_parts(caught.value, "cuda:0", "device_map='cpu'")
    Placement({"": "cpu"}).agree_with(torch.device("cpu"))


@pytest.mark.parametrize("kind", ["untied", "moe"])
def test_a_module_that_waits_on_the_cpu_is_fetched_for_each_call(kind, tmp_path):
    model = from_pretrained(save(tmp_path, kind), "int8")
    expected = logits(model)
    modules = [m for m in model.modules() if isinstance(m, QuantModule)]
    for module in modules:
        keep_on_cpu(module, torch.device("cpu"))
    assert torch.equal(logits(model), expected)
    held = [t for m in modules for t in m._buffers.values()]
    assert torch.equal(logits(model), expected)
    assert [t.data_ptr() for m in modules for t in m._buffers.values()] == [t.data_ptr() for t in held]


def test_its_weights_wait_on_the_cpu_when_a_call_fails_too(tmp_path):
    model = from_pretrained(save(tmp_path, "untied"), "int8")
    module = model.model.layers[0].mlp.up_proj
    keep_on_cpu(module, torch.device("cpu"))
    before = dict(module._buffers)
    with pytest.raises(RuntimeError):
        module(torch.ones(1, 7, dtype=torch.bfloat16))
    assert all(module._buffers[key] is tensor for key, tensor in before.items())
    assert model(IDS).logits.isfinite().all()
