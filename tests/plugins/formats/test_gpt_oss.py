"""The MXFP4 experts of GPT-OSS: decoded as Transformers decodes them (5.23), on a model of its own class."""

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


def test_experts_are_decoded_exactly_and_it_is_said(tmp_path):
    checkpoint = made()
    with pytest.warns(UserWarning, match="2 weights of experts in MXFP4 are decoded to 16 bits"):
        model = quantport.load(checkpoint.write(tmp_path), device="cpu")
    parameters = dict(model.named_parameters())
    assert checkpoint.values
    for name, value in checkpoint.values.items():
        assert same_bits(parameters[name].data, value), name
    with torch.no_grad():
        assert torch.isfinite(model(ids % 512).logits).all()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_attention_is_quantized_where_it_is_asked(tmp_path):
    model = quantport.load(made().write(tmp_path), "int8", device="cpu")
    quantized = {step.layer.name for step in model.quantport_plan.quantized}
    assert "model.layers.0.self_attn.q_proj" in quantized
    assert not any("experts" in name for name in quantized)


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
