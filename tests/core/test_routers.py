"""What stays in 16 bits for its role: routers, told by structure, and the layers at the end of a model."""

from __future__ import annotations

import pytest
from core_fakes import Shape
from core_models import made, same_state
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
