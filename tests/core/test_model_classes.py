"""Classes of the installed Transformers, tiny and random: each loads and is what it was, or is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from core_models import same_state
from core_references import check_parts
from core_tiny import output_of, tiny_model
from core_transformers import of_transformers
from transformers.models.auto import modeling_auto

import quantport
from quantport import numerics
from quantport.errors import QuantportError
from quantport.loading.locate import open_checkpoint
from quantport.modules import QuantExperts, QuantLinear, QuantModule
from quantport.plugins.registry import default_registry

pytestmark = pytest.mark.filterwarnings("ignore:.*of the bytes of matrices are quantized:UserWarning")
SCHEME = "int8_weight_only"
SOUND = {
    "conv_dim": [16, 16],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
SWIN = {"patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}
CLASSES: dict[str, dict] = {
    # decoders
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "GemmaForCausalLM": {},
    "Gemma2ForCausalLM": {},
    "Gemma3ForCausalLM": {},
    "Gemma3nForCausalLM": {},
    "PhiForCausalLM": {},
    "Phi3ForCausalLM": {},
    "OPTForCausalLM": {},
    "GPTNeoXForCausalLM": {},
    "GPTJForCausalLM": {"rotary_dim": 8},
    "BloomForCausalLM": {},
    "MptForCausalLM": {},
    "CohereForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "StableLmForCausalLM": {},
    "Starcoder2ForCausalLM": {},
    "GraniteForCausalLM": {},
    "Glm4ForCausalLM": {},
    "NemotronForCausalLM": {},
    # experts
    "MixtralForCausalLM": {},
    "Qwen2MoeForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
    "OlmoeForCausalLM": {},
    "DeepseekV2ForCausalLM": {"num_key_value_heads": 4},
    "DeepseekV3ForCausalLM": {"num_key_value_heads": 4},
    "DeepseekV4ForCausalLM": {},
    "GraniteMoeForCausalLM": {},
    "GptOssForCausalLM": {},
    "Llama4ForCausalLM": {},
    "DbrxForCausalLM": {
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
    "HunYuanMoEV1ForCausalLM": {},
    "HYV4ForCausalLM": {},
    "MiniMaxM3VLForCausalLM": {},
    "AriaTextForCausalLM": {"num_key_value_heads": 4},
    "OpenAIPrivacyFilterForTokenClassification": {},
    "DogeForCausalLM": {"is_moe": True},
    "JetMoeForCausalLM": {},
    "PhimoeForCausalLM": {},
    "Ernie4_5_MoeForCausalLM": {},
    "SwitchTransformersForConditionalGeneration": {
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    # state spaces
    "MambaForCausalLM": {},
    "Mamba2ForCausalLM": {"num_heads": 8, "n_groups": 2},
    "FalconMambaForCausalLM": {},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "RwkvForCausalLM": {"attention_hidden_size": 32},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8},
    # encoders
    "BertForSequenceClassification": {},
    "BertForMaskedLM": {},
    "RobertaForSequenceClassification": {},
    "DistilBertForQuestionAnswering": {},
    "ElectraForPreTraining": {},
    "DebertaV2ForSequenceClassification": {},
    "AlbertForMaskedLM": {},
    "ModernBertForMaskedLM": {},
    "MobileBertForMaskedLM": {"embedding_size": 16},
    # encoders and decoders
    "T5ForConditionalGeneration": {},
    "BartForConditionalGeneration": {},
    "M2M100ForConditionalGeneration": {},
    "WhisperForConditionalGeneration": {"max_source_positions": 16, "max_target_positions": 16},
    # images and sound
    "ViTForImageClassification": {},
    "Dinov2Model": {},
    "SwinForImageClassification": {
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 2],
        "num_heads": [2, 2],
        "window_size": 4,
    },
    "CLIPModel": {},
    "SiglipModel": {},
    "Wav2Vec2ForCTC": SOUND,
    "WavLMModel": SOUND,
    "LlavaForConditionalGeneration": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model"},
    },
}
# Experts that are stored as [in_features, out_features], and those in which rows of gate and up take turns.
TRANSPOSED = {"AriaExperts", "GptOssExperts", "Llama4TextExperts", "OpenAIPrivacyFilterExperts"}
INTERLEAVED = {"GptOssExperts"}
# What cannot be quantized, or not be loaded, and the word that its refusal must say.
REFUSED: dict[str, tuple[dict, str]] = {
    "GPT2LMHeadModel": ({}, "Conv1D"),
    "OpenAIGPTLMHeadModel": ({}, "Conv1D"),
    "FalconForCausalLM": ({}, "FalconLinear"),
    "MarianMTModel": ({}, "embed_positions"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_loads_and_computes_what_it_did(name, tmp_path):
    check_class(tiny_model(name, CLASSES[name]), tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_is_refused_by_name(name, tmp_path):
    own, word = REFUSED[name]
    tiny_model(name, own).save_pretrained(tmp_path)
    with pytest.raises(QuantportError, match=word):
        quantport.load(tmp_path, SCHEME)


def every_class():
    """Names of all classes that the mappings of Transformers' auto classes know, but those above."""
    names = {
        name
        for mapping, classes in vars(modeling_auto).items()
        if mapping.startswith("MODEL_") and mapping.endswith("_NAMES")
        for entry in classes.values()
        for name in ([entry] if isinstance(entry, str) else entry)
    }
    return sorted(names - set(CLASSES) - set(REFUSED))


@pytest.mark.slow
@pytest.mark.parametrize("name", every_class())
def test_every_class_that_can_be_made_tiny(name, tmp_path):
    try:
        original = tiny_model(name)
        output_of(original)
    except Exception as error:  # the table of sizes does not know all of its names, or it takes other inputs
        pytest.skip(f"no tiny model of it: {type(error).__name__}: {error}")
    try:
        check_class(original, tmp_path)
    except QuantportError as error:
        check_parts(error)


def check_class(original, folder):
    """Loads what ``original`` saves, and holds it against ``quantize_``, the plan, the file and itself."""
    original.save_pretrained(folder)
    usual = of_transformers(folder)
    held, buffers = usual.state_dict(), dict(usual.named_buffers())
    for name, tensor in (*original.named_parameters(), *original.named_buffers()):
        if name in held:
            tensor.data = tensor.data.to(held[name].dtype)  # as its class keeps some in FP32
        elif name in buffers:
            tensor.data = buffers[name]  # as they are filled after loading
    loaded, twin = quantport.load(folder, SCHEME), copy.deepcopy(original)
    quantized = quantport.quantize_(twin, SCHEME)
    same_state(loaded, twin)
    assert modules_of(loaded) == modules_of(twin)
    check_plan(loaded.quantport_plan, quantport.plan(folder, SCHEME), folder)
    assert {str(s.skip_reason) for s in quantized.steps if s.layer.is_matrix} == {
        str(s.skip_reason) for s in loaded.quantport_plan.steps if s.layer.is_matrix
    }
    found = output_of(loaded)
    assert found.isfinite().all()
    assert torch.equal(found, output_of(twin))
    dequantize_into(original, loaded)
    if distance(found, output_of(original)) > 0.03:  # rounding to 16 bits grows in some; to 32 it does not
        wide = quantport.load(folder, SCHEME, dtype=torch.float32)
        dequantize_into(original.float(), wide)
        assert distance(output_of(wide), output_of(original)) <= 1e-3


def distance(found, expected):
    """Their relative error."""
    return (found - expected).norm() / expected.norm()


def modules_of(model):
    return {path: module.scheme for path, module in model.named_modules() if isinstance(module, QuantModule)}


def check_plan(loaded, planned, folder):
    """The plan says beforehand what loading does, and names every tensor of the file, once."""
    said, done = (
        [(s.layer.name, s.requested_scheme, s.skip_reason, s.before, s.after) for s in plan.steps]
        for plan in (planned, loaded)
    )
    assert said == done
    with open_checkpoint(folder, default_registry()) as (checkpoint, _):
        tensors = dict(checkpoint.source.tensors)
    assert sum(info.nbytes for info in tensors.values()) == planned.before
    named = {part.tensor for s in planned.steps for parts in s.layer.parts.values() for part in parts}
    assert named == set(tensors)
    rows = {layer["name"] for layer in planned.to_dict()["layers"]}
    for step in planned.steps:
        assert step.requested_scheme or step.skip_reason
        shapes = [tensors[p.tensor].shape for ps in step.layer.parts.values() for p in ps]
        if any(sum(size > 1 for size in shape) > 1 for shape in shapes):
            assert step.layer.name in rows


def dequantize_into(original, loaded):
    """Gives the original the weights that the quantized modules stand for, which are near its own."""
    for path, module in loaded.named_modules():
        if not isinstance(module, QuantModule):
            continue
        for name, spec in module.specs.items():
            stored = module.stored_weight(name)
            target = weight_in(original.get_submodule(path), module, name)
            weight = numerics.dequantize_weight(stored, spec.scheme, spec.k, target.dtype)
            assert (weight.float() - target.float()).norm() <= 0.02 * target.float().norm(), (path, name)
            target.copy_(weight)


def weight_in(module, quantized, name):
    """The 16-bit weight that a weight of a quantized module was made from."""
    if isinstance(quantized, QuantExperts):
        expert, projection = name.split(".")
        return expert_weight(module, int(expert), projection)
    assert isinstance(quantized, QuantLinear), "one weight each"
    return module.weight.data


def expert_weight(module, expert, projection):
    """A projection of one expert, as the source of its class says that it is stored."""
    kind, is_down = type(module).__name__, projection == "down_proj"
    if kind == "DbrxExperts":
        flat = getattr(module.mlp, {"gate_proj": "w1", "up_proj": "v1", "down_proj": "w2"}[projection]).data
        matrix = flat.view(module.num_experts, -1, flat.shape[1])[expert]
        return matrix.T if is_down else matrix
    matrix = (module.down_proj if is_down else module.gate_up_proj).data[expert]
    if kind in TRANSPOSED:
        matrix = matrix.T
    if is_down:
        return matrix
    up = projection == "up_proj"
    return matrix[up::2] if kind in INTERLEAVED else matrix.split(len(matrix) // 2)[up]
