"""The MXFP4 experts of GPT-OSS: kept, and decoded as Transformers decodes them (5.23), on a model of its own
class.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from core_models import ids, same_bits
from format_checks import Made
from small_floats import mxfp4
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import quantport
from quantport.errors import CheckpointError
from quantport.numerics import dequantize_weight, quantize_weight

CHECKED_BY = "Transformers 5.23"


def made():
    config = transformers.GptOssConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors, values = {}, {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor
            continue
        each = [mxfp4(matrix.T.contiguous()) for matrix in tensor]
        blocks = torch.stack([packed.unflatten(1, (-1, 16)) for packed, _, _ in each])
        scales = torch.stack([exponents for _, exponents, _ in each])
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    described = json.loads(config.to_json_string())
    described |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    described["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return Made(described, tensors, values)


def of_transformers(checkpoint):
    """The model with the values that the codes stand for, in Transformers' own modules."""
    config = {key: v for key, v in checkpoint.config.items() if key != "quantization_config"}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig.from_dict(config)).bfloat16().eval()
    model.load_state_dict(checkpoint.tensors | checkpoint.values, strict=False)
    return model


def test_experts_are_kept_to_the_bit(tmp_path):
    checkpoint = made()
    model = quantport.load(checkpoint.write(tmp_path), device="cpu")
    experts = model.model.layers[0].mlp.experts
    assert {s.scheme for s in model.quantport_plan.quantized} == {"mxfp4_weight_only"}
    gate_up, down = (
        checkpoint.values[f"model.layers.0.mlp.experts.{n}"] for n in ("gate_up_proj", "down_proj")
    )
    for e in range(4):
        expected = {"gate_proj": gate_up[e].T[::2], "up_proj": gate_up[e].T[1::2], "down_proj": down[e].T}
        for name, value in expected.items():
            spec = experts.specs[f"{e}.{name}"]
            stored = experts.stored_weight(f"{e}.{name}")
            assert same_bits(dequantize_weight(stored, spec.scheme, spec.k, torch.bfloat16), value), (e, name)
    with torch.no_grad():
        found, expected = model(ids % 512).logits, of_transformers(checkpoint)(ids % 512).logits
    assert (found - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("scheme", ["int8", "fp8_per_block"])
def test_another_scheme_is_made_of_the_values(scheme, tmp_path):
    checkpoint = made()
    model = quantport.load(checkpoint.write(tmp_path), scheme, device="cpu")
    assert {step.scheme for step in model.quantport_plan.quantized} == {scheme}
    experts, values = (
        model.model.layers[0].mlp.experts,
        checkpoint.values["model.layers.0.mlp.experts.gate_up_proj"],
    )
    spec = experts.specs["2.up_proj"]
    expected = quantize_weight(values[2].T[1::2].contiguous(), spec.scheme)
    assert all(same_bits(experts.stored_weight("2.up_proj")[key], tensor) for key, tensor in expected.items())


def test_in_bf16_experts_are_what_their_codes_stand_for(tmp_path):
    checkpoint = made()
    experts = quantport.load(checkpoint.write(tmp_path), "bf16", device="cpu").model.layers[0].mlp.experts
    down = checkpoint.values["model.layers.0.mlp.experts.down_proj"]
    for e in range(4):
        assert same_bits(experts.stored_weight(f"{e}.down_proj")["weight"], down[e].T)


@pytest.mark.parametrize("damage", ["absent", "shape", "flat", "dtype"])
def test_what_is_wrong_is_refused(damage, tmp_path):
    checkpoint = made()
    name = next(n for n in checkpoint.tensors if n.endswith("_scales"))
    blocks = f"{name.removesuffix('_scales')}_blocks"
    if damage == "absent":
        del checkpoint.tensors[name]
    elif damage == "shape":
        checkpoint.tensors[name] = torch.ones(4, 3, 4, dtype=torch.uint8)
    elif damage == "flat":
        checkpoint.tensors[blocks] = checkpoint.tensors[blocks].flatten(0, 2)
    else:
        checkpoint.tensors[blocks] = checkpoint.tensors[blocks].int()
    with pytest.raises(CheckpointError) as caught:
        quantport.plan(checkpoint.write(tmp_path), device="cpu")
    assert "as mxfp4" in caught.value.asked
