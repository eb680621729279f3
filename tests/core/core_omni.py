"""A tiny random Qwen3-Omni: three stages in one checkpoint, which speak together."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
EXPERTS = {
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 16,
}
MEDIA = {"audio_token_id": 90, "image_token_id": 91, "video_token_id": 92, "audio_start_token_id": 93}
THINKER = {
    "text_config": {**TEXT, **EXPERTS},
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 8,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
    "audio_config": {
        "num_mel_bins": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "d_model": 32,
        "max_source_positions": 32,
        "n_window": 8,
        "output_dim": 32,
        "n_window_infer": 16,
        "conv_chunksize": 32,
        "downsample_hidden_size": 16,
    },
    "user_token_id": 89,
    "vision_start_token_id": 94,
    **MEDIA,
}
TALKER = {
    "text_config": {**TEXT, **EXPERTS, "vocab_size": 1088},  # all but the first 64 are never generated
    "code_predictor_config": {**TEXT, "vocab_size": 32, "num_code_groups": 4},
    "num_code_groups": 4,
    "thinker_hidden_size": 32,
    "accept_hidden_layer": 1,
    "spatial_merge_size": 2,
    "codec_eos_token_id": 60,
    "codec_nothink_id": 61,
    "codec_think_bos_id": 62,
    "codec_think_eos_id": 63,
    "codec_pad_id": 58,
    "codec_bos_id": 59,
    "vision_start_token_id": 94,
    "speaker_id": {"a": 57},
    **MEDIA,
}
CODE2WAV = {
    "codebook_size": 32,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_quantizers": 4,
    "upsample_rates": [2, 2],
    "upsampling_ratios": [2],
    "decoder_dim": 32,
    "sliding_window": 8,
    "max_position_embeddings": 128,
}
SPECIAL = ("im_start", "im_end", "tts_pad", "tts_bos", "tts_eos", "system", "user", "assistant")


def tiny_omni() -> Any:
    """The model in BF16."""
    ids = {f"{name}_token_id": 80 + i for i, name in enumerate(SPECIAL)} | {"user_token_id": 89}
    config = Qwen3OmniMoeConfig(thinker_config=THINKER, talker_config=TALKER, code2wav_config=CODE2WAV, **ids)
    torch.manual_seed(0)
    model = Qwen3OmniMoeForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():  # the class leaves the experts of the talker as memory was
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.02)
    return model.requires_grad_(False)
