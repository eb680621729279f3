"""Which layers a checkpoint has, from names and shapes alone."""

from __future__ import annotations

import pytest
import torch
from core_fakes import Shape, tensors

from quantport.model.layers import Part, find_layers
from quantport.model.roles import Role, SkipCode


def by_name(found):
    return {layer.name: layer for layer in find_layers(found)}


def test_dense():
    layers = by_name(
        tensors(
            model__embed_tokens__weight=(32, 8),
            model__a__q_proj__weight=(6, 8),
            model__a__q_proj__bias=(6,),
            model__norm__weight=(8,),
        )
    )
    q = layers["model.a.q_proj"]
    assert (q.kind, q.weights, q.dtype, q.experts, q.skip_reason) == (
        "linear",
        (("weight", 6, 8),),
        torch.bfloat16,
        0,
        None,
    )
    assert (q.elements, q.bytes, q.shards) == (48, 96, ())
    assert q.parts["weight"] == (Part("model.a.q_proj.weight"),)
    assert layers["model.embed_tokens"].role is Role.EMBEDDING
    assert {n: x.kind for n, x in layers.items() if x.kind == "other"} == {
        "model.a.q_proj.bias": "other",
        "model.norm.weight": "other",
    }
    assert sum(x.bytes for x in layers.values()) == 2 * (32 * 8 + 48 + 6 + 8)


def test_order_is_that_of_the_checkpoint():
    names = [
        "b.weight",
        "a.weight",
        "m.experts.0.up_proj.weight",
        "c.bias",
        "m.experts.0.down_proj.weight",
        "m.experts.0.gate_proj.weight",
        "d.weight",
    ]
    found = find_layers({n: Shape((4, 4) if n.endswith("weight") else (4,)) for n in names})
    assert [x.name for x in found] == ["b", "a", "m.experts", "c.bias", "d"]


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")], ids=str)
def test_experts_one_by_one(names):
    gate, up, down = names
    found = {}
    for e in (2, 0, 10, 1, *range(3, 10)):  # ten comes after nine, not after one
        found[f"model.layers.0.mlp.experts.{e}.{gate}.weight"] = Shape((6, 8))
        found[f"model.layers.0.mlp.experts.{e}.{down}.weight"] = Shape((8, 6))
        found[f"model.layers.0.mlp.experts.{e}.{up}.weight"] = Shape((6, 8))
    (layer,) = find_layers(found)
    assert (layer.name, layer.kind, layer.experts) == ("model.layers.0.mlp.experts", "moe", 11)
    assert layer.weights == (("gate_proj", 6, 8), ("up_proj", 6, 8), ("down_proj", 8, 6))
    assert layer.parts["gate_proj"][10].tensor == f"model.layers.0.mlp.experts.10.{gate}.weight"
    assert layer.parts["down_proj"][2].tensor == f"model.layers.0.mlp.experts.2.{down}.weight"
    assert layer.bytes == 11 * 3 * 48 * 2
    assert layer.shards[:4] == tuple(
        f"{layer.name}.{s}" for s in ("0.gate_proj", "0.up_proj", "0.down_proj", "1.gate_proj")
    )


def test_fused_experts():
    (layer,) = find_layers(
        tensors(a__mlp__experts__gate_up_proj=(4, 12, 8), a__mlp__experts__down_proj=(4, 8, 6))
    )
    assert (layer.name, layer.kind, layer.experts) == ("a.mlp.experts", "moe", 4)
    assert layer.weights == (("gate_proj", 6, 8), ("up_proj", 6, 8), ("down_proj", 8, 6))
    assert layer.parts["gate_proj"][3] == Part("a.mlp.experts.gate_up_proj", 3, 0, 6)
    assert layer.parts["up_proj"][3] == Part("a.mlp.experts.gate_up_proj", 3, 6, 12)
    assert layer.parts["down_proj"][3] == Part("a.mlp.experts.down_proj", 3)
    assert layer.bytes == 2 * 4 * 3 * 48


@pytest.mark.parametrize(("inner", "hidden"), [(6, 8), (8, 8), (4, 8), (8, 4)])
def test_shapes_say_whether_fused_experts_are_transposed(inner, hidden):
    gate_up, down = (4, 2 * inner, hidden), (4, hidden, inner)
    for transposed in (False, True):
        turned = [(e, k, n) if transposed else (e, n, k) for e, n, k in (gate_up, down)]
        (layer,) = find_layers(tensors(experts__gate_up_proj=turned[0], experts__down_proj=turned[1]))
        assert layer.weights == (
            ("gate_proj", inner, hidden),
            ("up_proj", inner, hidden),
            ("down_proj", hidden, inner),
        )
        assert {p.transposed for parts in layer.parts.values() for p in parts} == {transposed}


def test_a_part_names_rows_of_a_matrix_however_it_is_stored():
    stored = torch.arange(2 * 6 * 5, dtype=torch.int32, device="cpu").view(2, 6, 5)
    second = stored[1]
    assert torch.equal(Part("x", 1).select(stored), second)
    assert torch.equal(Part("x", 1, 1, 5).rows(1, 3).select(stored), second[2:4])
    assert torch.equal(Part("x", 1, 1, 6, 2).select(stored), second[[1, 3, 5]])
    assert torch.equal(Part("x", 1, 1, 6, 2).rows(1, 3).select(stored), second[[3, 5]])
    assert torch.equal(Part("x", 1, 0, 4, transposed=True).select(stored), second[:, :4].T)
    assert torch.equal(Part("x", 1, 1, 5, 2, True).rows(0, 1).select(stored), second[:, 1:2].T)
    assert torch.equal(Part("x", 1, transposed=True, experts=2).select(stored.flatten(0, 1)), second.T)


@pytest.mark.parametrize("prefix", ["", "mlp."])
def test_experts_at_the_root(prefix):
    """A MoE block by itself, as quantize_(block) sees it."""
    fused = find_layers(
        {f"{prefix}experts.gate_up_proj": Shape((2, 12, 8)), f"{prefix}experts.down_proj": Shape((2, 8, 6))}
    )
    assert [(x.name, x.kind) for x in fused] == [(f"{prefix}experts", "moe")]
    names = [
        f"{prefix}experts.{e}.{p}.weight" for e in range(2) for p in ("gate_proj", "up_proj", "down_proj")
    ]
    assert [(x.name, x.kind) for x in find_layers({n: Shape((8, 8)) for n in names})] == [
        (f"{prefix}experts", "moe")
    ]


def test_fused_experts_of_odd_rows_lose_nothing():
    layers = find_layers(tensors(a__experts__gate_up_proj=(2, 7, 8), a__experts__down_proj=(2, 8, 3)))
    assert sum(x.elements for x in layers) == 2 * (7 * 8 + 8 * 3)
    assert all(x.skip_reason for x in layers)


def test_experts_that_are_not_uniform_become_linear_layers():
    found = {
        f"m.experts.{e}.{p}.weight": Shape((6 + e, 8))
        for e in range(2)
        for p in ("gate_proj", "up_proj", "down_proj")
    }
    layers = find_layers(found)
    assert {x.kind for x in layers} == {"linear"}
    assert [x.name + ".weight" for x in layers] == list(found)
    gap = {n: t for n, t in found.items() if ".0.up" not in n}
    assert len(find_layers(gap)) == 5
    missing_expert = {
        f"m.experts.{e}.{p}.weight": Shape((6, 6))
        for e in (0, 2)
        for p in ("gate_proj", "up_proj", "down_proj")
    }
    assert {x.kind for x in find_layers(missing_expert)} == {"linear"}


def test_experts_of_mixed_dtypes_count_right():
    found = {
        f"m.experts.{e}.{p}.weight": Shape((6, 6))
        for e in range(2)
        for p in ("gate_proj", "up_proj", "down_proj")
    }
    found["m.experts.1.up_proj.weight"] = Shape((6, 6), torch.float32)
    assert sum(x.bytes for x in find_layers(found)) == 36 * (5 * 2 + 4)


def test_shared_experts_are_linear():
    layers = by_name(
        tensors(m__shared_experts__gate_proj__weight=(6, 8), m__shared_expert__up_proj__weight=(6, 8))
    )
    assert {x.kind for x in layers.values()} == {"linear"}
    assert {x.skip_reason for x in layers.values()} == {None}


def test_fused_names_have_shards():
    layers = by_name(
        tensors(a__qkv_proj__weight=(12, 8), a__gate_up_proj__weight=(12, 8), qkv_proj__weight=(4, 4))
    )
    assert layers["a.qkv_proj"].shards == ("a.q_proj", "a.k_proj", "a.v_proj")
    assert layers["a.gate_up_proj"].shards == ("a.gate_proj", "a.up_proj")
    assert layers["qkv_proj"].shards == ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("lm_head", Role.HEAD),
        ("model.lm_head", Role.HEAD),
        ("embed_out", Role.HEAD),
        ("transformer.wte", Role.EMBEDDING),
        ("a.embed_tokens", Role.EMBEDDING),
        ("mlp.gate", Role.ROUTER),
        ("block_sparse_moe.gate", Role.ROUTER),
        ("ffn.router", Role.ROUTER),
        ("ffn.router.layer", Role.ROUTER),
        ("mlp.shared_expert_gate", Role.ROUTER),
        ("score", Role.CLASSIFIER),
        ("bert.classifier", Role.CLASSIFIER),
        ("mlp.gate_proj", Role.LINEAR),
        ("a.gated", Role.LINEAR),
        ("my_lm_head2", Role.LINEAR),
    ],
)
def test_what_is_left_alone_by_default_hangs_on_the_role(name, role):
    (layer,) = find_layers({f"{name}.weight": Shape((8, 8))})
    assert layer.role is role
    assert layer.skipped_as(SkipCode.ROLE) == (role is not Role.LINEAR)
    assert layer.opt_in == (role not in (Role.LINEAR, Role.ROUTER))


def test_an_embedding_stored_in_another_dtype_is_one_and_cannot_be_asked_for():
    (layer,) = find_layers({"embed_tokens.weight": Shape((8, 8), torch.int8)})
    assert (layer.role, layer.opt_in) == (Role.EMBEDDING, False)


@pytest.mark.parametrize(
    ("shape", "role", "code"),
    [
        ((8, 4, 3, 3), Role.CONVOLUTION, SkipCode.CONVOLUTION),
        ((8,), Role.OTHER, SkipCode.NOT_A_MATRIX),
    ],
)
def test_what_is_no_matrix_has_a_role_too(shape, role, code):
    (layer,) = find_layers({"a.weight": Shape(shape)})
    assert (layer.kind, layer.role, layer.skipped_as(code)) == ("other", role, True)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)], ids=str)
def test_zero_size(shape):
    assert by_name(tensors(a__weight=shape))["a"].skipped_as(SkipCode.ZERO_SIZE)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float64, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_kept_with_their_name(dtype):
    (layer,) = find_layers({"a.weight": Shape((8, 8), dtype)})
    assert layer.skipped_as(SkipCode.STORED_DTYPE)
    assert str(dtype) in str(layer.skip_reason)


def test_odd_names_and_shapes():
    found = tensors(
        weight=(4, 4),
        a__b=(4, 4),
        conv__weight=(4, 4, 3),
        scalar__weight=(),
        v__weight=(4,),
        experts__weight=(4, 4),
    )
    layers = by_name(found)
    assert layers[""].kind == "linear"
    assert {n: layers[n].kind for n in ("a.b", "conv.weight", "scalar.weight", "v.weight")} == dict.fromkeys(
        ("a.b", "conv.weight", "scalar.weight", "v.weight"), "other"
    )
    assert layers["experts"].kind == "linear"
    assert sum(x.elements for x in layers.values()) == 16 + 16 + 48 + 1 + 4 + 16
    assert find_layers({}) == []
