"""Updating a weight: the bits of a fresh load, in the memory of the weight before."""

from __future__ import annotations

import pytest
import torch
from core_models import MOE, Tiny, ids, made, same_state, write

import quantport
from quantport.errors import WeightError
from quantport.kernels.base import Request, WeightSpec
from quantport.kernels.verdict import Rejected
from quantport.loading import update_weight
from quantport.modules import QuantExperts, QuantLinear
from quantport.plugins.registry import default_registry

LINEAR = ("up", "down", "narrow", "moe.experts.1.down_proj")


def loaded(folder, scheme):
    return quantport.load(folder, scheme, model=Tiny, device="cpu")


@pytest.mark.parametrize(
    "scheme", ["int8", "fp8_per_tensor", "int4_weight_only_g32", "int4_mse", "mxfp4", "q4_0"]
)
def test_a_linear_layer_has_the_bits_of_a_fresh_load(scheme, tmp_path):
    old, new = made(Tiny), made(Tiny, seed=1)
    model = loaded(write(tmp_path / "old", old), scheme)
    mixed = old.state_dict()
    for name in LINEAR:
        module = model.get_submodule(name)
        before = [t.data_ptr() for t in module.packed()]
        mixed[f"{name}.weight"] = new.state_dict()[f"{name}.weight"]
        update_weight(module, "", mixed[f"{name}.weight"])
        assert [t.data_ptr() for t in module.packed()] == before
    fresh = loaded(write(tmp_path / "new", mixed), scheme)
    same_state(model, fresh)
    tokens = torch.arange(8).view(2, 4)
    assert torch.equal(model(tokens), fresh(tokens))


def test_an_expert_is_updated_where_it_lies():
    model = quantport.load(MOE, "int8", device="cpu")
    experts = next(m for m in model.modules() if isinstance(m, QuantExperts))
    with torch.no_grad():
        before = model(ids).logits
    weight = torch.zeros(experts.down.n, experts.down.k, dtype=torch.bfloat16)
    others = {name: experts.stored_weight(name) for name in experts.specs if name.partition(".")[0] != "1"}
    pointers = {name: [t.data_ptr() for t in experts.packed(name)] for name in experts.specs}
    for e in range(experts.num_experts):
        update_weight(experts, f"{e}.down_proj", weight)
    assert pointers == {name: [t.data_ptr() for t in experts.packed(name)] for name in experts.specs}
    for name, stored in others.items():
        if not name.endswith("down_proj"):
            assert all(torch.equal(t, stored[key]) for key, t in experts.stored_weight(name).items())
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, before)  # what the forward had made of them is made anew


def test_what_does_not_fit_changes_nothing(tmp_path):
    model = loaded(write(tmp_path / "m", made(Tiny)), "int8")
    before = {key: tensor.clone() for key, tensor in model.up.state_dict().items()}
    bad = torch.full((129, 32), torch.nan).bfloat16()
    for name, weight, found in (
        ("", torch.ones(32, 129).bfloat16(), r"shape \[32, 129\]"),
        ("gate", torch.ones(129, 32).bfloat16(), "no weight of this name"),
        ("", torch.ones(129, 32, dtype=torch.int8), "dtype torch.int8"),
        ("", bad, "NaN or Inf"),
    ):
        with pytest.raises(WeightError, match=found):
            update_weight(model.up, name, weight)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.up.state_dict().items())
    update_weight(model.up, "", bad, nonfinite="zero")
    assert not model.up.stored_weight()["weight"].any()


def test_what_onednn_packs_is_packed_anew():
    registry = default_registry()
    spec, kernel = WeightSpec(registry.schemes["bf16"], 48, 32), registry.kernel("cpu.bf16")
    if isinstance(kernel.verdict(Request(spec, "linear", registry.device("cpu"))), Rejected):
        pytest.skip("oneDNN packs BF16 on processors with AVX-512 or BF16 instructions")
    module = QuantLinear(kernel, spec)
    for seed in range(2):
        weight = torch.full((48, 32), 1.5 + seed, dtype=torch.bfloat16)
        if seed:
            update_weight(module, "", weight)
        else:
            module.set_weight("", {"weight": weight})
        assert torch.equal(module.state_dict()["weight"], weight)
