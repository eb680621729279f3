"""What stays in 16 bits for its role: routers, told by structure, and the layers at the end of a model."""

from __future__ import annotations

import pytest
from core_fakes import Shape
from core_models import made, same_state, write
from core_tiny import tiny_model
from torch import nn

import quantport
from quantport.model.layers import find_layers
from quantport.model.roles import Role
from quantport.modules import QuantLinear

EXPERTS = {
    "one by one": {f"m.experts.{e}.{p}.weight": (48, 32) for e in range(6) for p in ("up", "down")},
    "named": {f"m.experts.expert_{e}.fc1.weight": (48, 32) for e in range(6)},
    "linear": {f"m.experts.{e}.weight": (48, 32) for e in range(6)},
    "fused": {"m.experts.gate_up_proj": (6, 96, 32), "m.experts.down_proj": (6, 32, 48)},
    "transposed": {"m.experts.gate_up_proj": (6, 32, 96), "m.experts.down_proj": (6, 48, 32)},
    "stacked": {"m.local_experts.w1.weight": (6, 48, 32)},
}
OTHERS = {
    "m.shared_experts.up_proj.weight": (48, 32),
    "m.attention.q.weight": (6, 32),
    "m.attention.k.weight": (6, 32),
    "m.out.weight": (32, 32),
    "n.choose.weight": (6, 32),
}


def roles(shapes):
    return {layer.name: layer.role for layer in find_layers({n: Shape(s) for n, s in shapes.items()})}


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("name", ["choose", "wg", "pick.wg", "pick.layer", "routing"])
def test_a_router_is_told_by_structure(experts, name):
    """As many outputs as there are experts, beside them, alone in its module if it has one."""
    found = roles({f"m.{name}.weight": (6, 32), **EXPERTS[experts], **OTHERS})
    assert found[f"m.{name}"] is Role.ROUTER
    assert {found[other.removesuffix(".weight")] for other in OTHERS} == {Role.LINEAR}


UNNAMED = {
    "mlps": {
        f"m.mlps.{e}.{p}.weight": s for e in range(6) for p, s in (("fc1", (48, 32)), ("fc2", (32, 48)))
    },
    "gated": {
        f"m.ffns.{e}.{p}.weight": s
        for e in range(6)
        for p, s in (("w1", (48, 32)), ("w2", (32, 48)), ("w3", (48, 32)))
    },
    "sequences": {f"m.nets.{e}.net.{i}.weight": (32, 32) for e in range(6) for i in (0, 2)},
    "linear": {f"m.list.{e}.{p}": s for e in range(6) for p, s in (("weight", (32, 32)), ("bias", (32,)))},
}
ROUTERS = {
    "one": {"choose": (6, 32)},
    "alone in its module": {"pick.wg": (6, 32)},
    "two": {"pick.fc1": (16, 32), "pick.fc2": (6, 16)},
    "three in any order": {"pick.out": (6, 8), "pick.mid": (8, 16), "pick.up": (16, 32)},
    "a sequence": {"pick.0": (32, 32), "pick.2": (6, 32)},
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("experts", [*EXPERTS, *UNNAMED])
def test_routers_of_several_layers_and_experts_of_any_name(experts, router):
    shapes = {**EXPERTS, **UNNAMED}[experts]
    others = OTHERS if experts in EXPERTS else {n: s for n, s in OTHERS.items() if s != (6, 32)}
    found = roles({**{f"m.{n}.weight": s for n, s in ROUTERS[router].items()}, **shapes, **others})
    assert {found[f"m.{name}"] for name in ROUTERS[router]} == {Role.ROUTER}
    kept = {role for name, role in found.items() if name.removeprefix("m.") not in ROUTERS[router]}
    assert Role.ROUTER not in kept


BLOCKS = {
    f"m.layers.{i}.{p}.weight": (32, 32)
    for i in range(6)
    for p in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
}


@pytest.mark.parametrize(
    ("router", "beside"),
    [
        ({"choose": (6, 32)}, BLOCKS),
        ({"choose": (6, 64)}, UNNAMED["mlps"]),
        ({"choose": (5, 32)}, UNNAMED["mlps"]),
        ({"pick.fc1": (16, 32), "pick.fc2": (5, 16)}, UNNAMED["mlps"]),
        ({"pick.fc1": (16, 32), "pick.fc2": (6, 24)}, UNNAMED["mlps"]),
        ({"pick.fc1": (16, 64), "pick.fc2": (6, 16)}, UNNAMED["mlps"]),
        ({"pick.fc1": (16, 32), "pick.fc2": (6, 16), "pick.side": (16, 32)}, EXPERTS["fused"]),
        ({"choose": (6, 32)}, {name: s for name, s in UNNAMED["mlps"].items() if "mlps.3" not in name}),
        ({"choose": (6, 32)}, {**UNNAMED["mlps"], "m.mlps.3.fc2.weight": (32, 40)}),
        ({"choose": (1, 32)}, {name: s for name, s in UNNAMED["mlps"].items() if "mlps.0" in name}),
        ({"choose": (6, 32)}, {f"m.heads.{i}.{p}.weight": (8, 32) for i in range(6) for p in ("up", "gate")}),
    ],
    ids=[
        *("blocks", "other inputs", "other number", "other outputs", "no chain", "other inputs of two"),
        *("a layer beside", "a gap", "uneven", "one", "heads"),
    ],
)
def test_what_is_no_router_beside_a_list(router, beside):
    found = roles({**{f"m.{n}.weight": s for n, s in router.items()}, **beside})
    assert {found[f"m.{name}"] for name in router} == {Role.LINEAR}


@pytest.mark.parametrize("shape", [(5, 32), (12, 32), (1, 32)], ids=str)
def test_another_number_of_outputs_is_no_router(shape):
    assert roles({"m.choose.weight": shape, **EXPERTS["fused"]})["m.choose"] is Role.LINEAR


@pytest.mark.parametrize(
    "name",
    [
        *("mlp.gate", "mlp.gate.wg", "mlp.router_gate", "altup.modality_router", "moe.gate.layer"),
        *("ffn.gating", "ffn.moe_gate", "ffn.switch", "ffn.expert_router", "block.router.mlp.fc1"),
    ],
)
def test_a_name_helps_where_there_is_no_structure(name):
    assert roles({f"{name}.weight": (6, 32)})[name] is Role.ROUTER


@pytest.mark.parametrize("name", ["mlp.gate", "ffn.switch", "ffn.gating"])
def test_a_projection_of_an_mlp_is_no_router_whatever_it_is_called(name):
    assert roles({f"{name}.weight": (48, 32)})[name] is Role.LINEAR


SPARSE = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}


class Unnamed(nn.Module):
    """A router of two layers, beside experts that nothing calls so."""

    def __init__(self):
        super().__init__()
        self.picker = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
        self.ffns = nn.ModuleList(nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32)) for _ in range(4))
        self.out = nn.Linear(32, 32)


def test_a_router_of_several_layers_is_not_quantized(tmp_path):
    def factory():
        return nn.ModuleDict({"moe": Unnamed()})

    model = made(factory)
    loaded = quantport.load(write(tmp_path / "model", model), "int8_weight_only", model=factory)
    quantport.quantize_(model, "int8_weight_only")
    for done in (model, loaded):
        assert all(type(done.moe.picker[i]) is nn.Linear for i in (0, 2))
        assert all(isinstance(m, QuantLinear) for m in (*done.moe.ffns[3], done.moe.out))


class Mixture(nn.Module):
    """A router under any name, beside experts."""

    def __init__(self, name):
        super().__init__()
        self.add_module(name, nn.Linear(32, 4))
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.out = nn.Linear(32, 32)


@pytest.mark.parametrize("name", ["gating", "moe_gate", "switch", "expert_router", "anything"])
def test_the_router_of_a_module_is_not_quantized(name):
    model = made(lambda: nn.ModuleDict({"moe": Mixture(name)}))
    quantport.quantize_(model, "int8_weight_only")
    assert type(model.moe.get_submodule(name)) is nn.Linear
    assert all(isinstance(m, QuantLinear) for m in (*model.moe.experts, model.moe.out))


@pytest.mark.filterwarnings("ignore:.*of the bytes of matrices are quantized:UserWarning")
@pytest.mark.parametrize(
    ("name", "own", "kept"),
    [
        ("HunYuanMoEV1ForCausalLM", {}, {"wg", "lm_head"}),
        ("DogeForCausalLM", {"is_moe": True}, {"router_gate", "lm_head"}),
        ("Gemma3nForCausalLM", {}, {"modality_router", "prediction_coefs", "correction_coefs", "lm_head"}),
        ("SwitchTransformersForConditionalGeneration", SPARSE, {"classifier", "lm_head"}),
        ("BertForSequenceClassification", {}, {"dense", "classifier"}),
        ("RobertaForSequenceClassification", {}, {"dense", "out_proj"}),
        ("DistilBertForQuestionAnswering", {}, {"qa_outputs"}),
        ("DistilBertForSequenceClassification", {}, {"pre_classifier", "classifier"}),
        ("LlamaForSequenceClassification", {}, {"score"}),
        ("GPTNeoXForCausalLM", {}, {"lm_head"}),
        ("ElectraForPreTraining", {}, {"dense", "dense_prediction"}),
        ("BertForPreTraining", {}, {"dense", "decoder", "seq_relationship"}),
        ("ViTForImageClassification", {}, {"classifier"}),
        ("CLIPModel", {}, {"text_projection", "visual_projection"}),
        ("WhisperForConditionalGeneration", {"max_source_positions": 16}, {"proj_out"}),
    ],
)
def test_routers_and_heads_of_transformers_are_not_quantized(name, own, kept):
    model = tiny_model(name, own)
    quantport.quantize_(model, "int8_weight_only")
    plain = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    assert {path.rpartition(".")[2] for path in plain} == kept
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) > len(plain)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("LlamaForSequenceClassification", "score"),
        ("BertForSequenceClassification", "bert.pooler.dense"),
        ("ElectraForPreTraining", "discriminator_predictions.dense_prediction"),
    ],
)
def test_a_layer_at_the_end_is_quantized_where_it_is_named(name, layer, tmp_path):
    tiny_model(name).save_pretrained(tmp_path / "model")
    config = {"scheme": "int8_weight_only", "targets": {layer: "int8_weight_only"}}
    model = quantport.load(tmp_path / "model", config=config)
    assert isinstance(model.get_submodule(layer), QuantLinear)
    same_state(quantport.load(quantport.save(model, tmp_path / "saved")), model)
