"""The MXFP4 experts of GPT-OSS: kept, and decoded as Transformers decodes them (5.23), on a model of its own
class.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from core_models import ids
from format_checks import Made, converts, keeps, overlays
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
    tensors, fused, values = {}, {}, {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor
            continue
        each = [mxfp4(matrix.T.contiguous()) for matrix in tensor]
        blocks = torch.stack([packed.unflatten(1, (-1, 16)) for packed, _, _ in each])
        scales = torch.stack([exponents for _, exponents, _ in each])
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        fused[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        for e, matrix in enumerate(fused[name].float().mT):
            base = f"{name.rpartition('.')[0]}.{e}"
            if name.endswith("down_proj"):
                values[f"{base}.down_proj.weight"] = matrix
            else:  # in turns
                values |= {f"{base}.gate_proj.weight": matrix[::2], f"{base}.up_proj.weight": matrix[1::2]}
    described = json.loads(config.to_json_string())
    described |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    described["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return Made(described, tensors, values, "mxfp4_weight_only"), fused


def test_it_is_kept_to_the_bit(tmp_path):
    checkpoint, fused = made()
    model = keeps(checkpoint, tmp_path)
    config = {key: v for key, v in checkpoint.config.items() if key != "quantization_config"}
    usual = transformers.GptOssForCausalLM(transformers.GptOssConfig.from_dict(config)).bfloat16().eval()
    usual.load_state_dict(checkpoint.tensors | fused, strict=False)
    with torch.no_grad():
        found, expected = model(ids % 512).logits, usual(ids % 512).logits
    assert (found - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8_per_block"])
def test_it_becomes_another_scheme(scheme, tmp_path):
    converts(made()[0], tmp_path, scheme)


def test_what_was_left_is_quantized(tmp_path):
    overlays(made()[0], tmp_path, "*.self_attn.q_proj")


@pytest.mark.parametrize("damage", ["absent", "shape", "flat", "dtype"])
def test_what_is_wrong_is_refused(damage, tmp_path):
    checkpoint, _ = made()
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
