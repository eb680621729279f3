"""Device maps and offloading: outputs and state dict are what they were, and a model that is offloaded is not
saved half.
"""

from __future__ import annotations

import warnings

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from core_models import DENSE, MOE, ids, same_bits
from core_references import check_parts

import quantport
from quantport.errors import SaveError

ENDS = dict.fromkeys(("model.embed_tokens", "lm_head"), "int8_weight_only")
MODELS = {
    "int8": (DENSE, {"scheme": "int8"}),
    "fp8": (DENSE, {"scheme": "fp8_per_tensor"}),
    "tied and quantized": (DENSE, {"scheme": "int8", "targets": ENDS}),
    "experts": (MOE, {"scheme": "int4_weight_only"}),
}
PARTS = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")


def dispatch(model, folder):
    return accelerate.dispatch_model(model, {"": "cpu"})


def with_hooks(model, folder):
    return accelerate.dispatch_model(model, dict.fromkeys(PARTS, "cpu"), main_device="cpu", force_hooks=True)


def cpu_offload(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def disk_map(model, folder):
    where = {**dict.fromkeys(PARTS, "cpu"), "model.layers": "disk"}
    return accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=folder)


def disk_offload(model, folder):
    return accelerate.disk_offload(model, folder, execution_device="cpu")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "how", [dispatch, with_hooks, cpu_offload, disk_map, disk_offload], ids=lambda f: f.__name__
)
def test_outputs_and_state_are_what_they_were(name, how, tmp_path):
    path, config = MODELS[name]
    model = quantport.load(path, config=config)
    expected, state = model(ids).logits, {key: t.clone() for key, t in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # accelerate notes that biases and norms are elsewhere
        moved = how(model, tmp_path)
    for _ in range(2):
        assert torch.equal(moved(ids).logits, expected)
    assert {k for k, t in moved.state_dict().items() if t.is_meta} <= {
        k for k, t in state.items() if t.dtype == torch.bfloat16
    }
    remove_hook_from_submodules(moved)
    back = moved.state_dict()
    assert back.keys() == state.keys()
    assert all(same_bits(back[key], tensor) for key, tensor in state.items())
    assert torch.equal(moved(ids).logits, expected)


def test_an_offloaded_model_is_not_saved(tmp_path):
    model = accelerate.cpu_offload(quantport.load(DENSE, "int8"), execution_device="cpu")
    with pytest.raises(SaveError) as caught:
        quantport.save(model, tmp_path / "out")
    check_parts(caught.value, "meta", "model.embed_tokens.weight")
    assert not (tmp_path / "out").exists()
    remove_hook_from_submodules(model)
    quantport.load(quantport.save(model, tmp_path / "out"))


@pytest.mark.parametrize("name", ["int8", "tied and quantized"])
def test_weights_that_somebody_exchanges_are_the_ones_that_run(name):
    """accelerate moves a module by putting other tensors into its buffers."""
    model = quantport.load(DENSE, config=MODELS[name][1])
    other = (
        model.get_submodule("model.layers.0.mlp.up_proj"),
        model.model.embed_tokens,
        model.get_submodule("model.layers.0.mlp"),
    )
    expected = model(ids).logits
    for module in [m for m in other if hasattr(m, "packed")]:
        for key, tensor in list(module._buffers.items()):
            module._buffers[key] = torch.zeros_like(tensor)
        assert all(not t.view(torch.uint8).any() for t in module.stored_weight().values())
    assert not torch.equal(model(ids).logits, expected)
